"""Imports at first use: the names of packages, and modules of a higher layer that a lower one calls.

Imported by ``vlprompt/__init__.py``, so it imports nothing slow; not even ``typing``.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # of typing, which takes some milliseconds; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROVIDERS: dict[str, str] = {}
"""Modules of higher layers by what they provide to lower ones; ``vlprompt/__init__.py`` names them."""


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are loaded when first used.

    The stub ``__init__.pyi`` next to the package's ``__init__.py`` is the one list of the names, which type checkers
    read as well. It has one import a line: ``from vlprompt.backbone.loader import load_backbone as load_backbone``.

    Args:
        package: ``__name__`` of the package.
        file: ``__file__`` of the package.
    """
    homes: dict[str, str] = {}
    with open(file.rpartition(".")[0] + ".pyi", encoding="utf-8") as stub:
        for line in stub:
            if line.startswith("from "):
                _, module, _, name, *_ = line.split()
                homes[name] = module

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(homes), sorted(homes)


def provider(what: str) -> Any:
    """Return the module of a higher layer that provides ``what``; it is imported at the first call."""
    return import_module(PROVIDERS[what])
