"""Frozen CLIP backbones: loading, text tower, image tower. Nothing here is trained or depends on a method.

Names are imported on first use, because importing open_clip takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.backbone.added import Added as Added
    from vlprompt.backbone.backbone import Backbone as Backbone
    from vlprompt.backbone.backbone import Capabilities as Capabilities
    from vlprompt.backbone.backbone import Preprocess as Preprocess
    from vlprompt.backbone.image_tower import ImageTower as ImageTower
    from vlprompt.backbone.image_tower import VisualTokens as VisualTokens
    from vlprompt.backbone.layout import TokenLayout as TokenLayout
    from vlprompt.backbone.layout import WordUpdate as WordUpdate
    from vlprompt.backbone.loader import list_backbones as list_backbones
    from vlprompt.backbone.loader import load_backbone as load_backbone
    from vlprompt.backbone.loader import shapes_only as shapes_only
    from vlprompt.backbone.text_tower import TextTower as TextTower

_HOMES = {
    "Added": "added",
    "Backbone": "backbone",
    "Capabilities": "backbone",
    "ImageTower": "image_tower",
    "Preprocess": "backbone",
    "TextTower": "text_tower",
    "TokenLayout": "layout",
    "VisualTokens": "image_tower",
    "WordUpdate": "layout",
    "list_backbones": "loader",
    "load_backbone": "loader",
    "shapes_only": "loader",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
