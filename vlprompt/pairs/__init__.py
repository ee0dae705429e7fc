"""Image-caption pairs: files, shards and their features.

The names below are loaded when first used, so that ``import vlprompt.pairs`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.pairs.features import caption_features, image_features
    from vlprompt.pairs.load import Pair, load_pairs

_HOMES = {
    "features": ("caption_features", "image_features"),
    "load": ("Pair", "load_pairs"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Pair",
    "caption_features",
    "image_features",
    "load_pairs",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vlprompt.pairs.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
