"""Settings that other settings switch off: they are named in the output and left out of recorded configurations.

A :func:`~vlprompt.config.types.validated` dataclass declares them in a method ``without_effect``, which returns the
reason for each of its fields without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.config.types import field_hints


def without_effect(section: Any, where: str | None = None) -> dict[str, str]:
    """Return the settings without effect by dotted key, each with the reason.

    Args:
        section: An instance of a :func:`~vlprompt.config.types.validated` dataclass; its nested sections count.
        where: Prefix of the keys; None for that of the class.
    """
    kind = type(section)
    prefix: str = vars(kind)["__where__"] if where is None else where
    own: Mapping[str, str] = section.without_effect() if hasattr(kind, "without_effect") else {}
    found = {f"{prefix}.{name}".removeprefix("."): reason for name, reason in own.items()}
    for name in field_hints(kind):
        value, key = getattr(section, name), f"{prefix}.{name}".removeprefix(".")
        if hasattr(type(value), "__where__") and key not in found:
            found |= without_effect(value, key)
    return found


def switched_off(reason: str, *names: str) -> dict[str, str]:
    """Return ``reason`` for each of the fields ``names``, as ``without_effect`` of a section returns it."""
    return dict.fromkeys(names, reason)
