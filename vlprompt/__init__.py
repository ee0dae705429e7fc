"""vlprompt: adapts frozen CLIP models to your own classes with a few labelled images, or none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlprompt.version import __version__ as __version__

# Public names and the modules they live in; a module is imported when one of its names is first used, so that
# ``import vlprompt`` is quick.
_HOMES = {
    "Backbone": "vlprompt.backbone",
    "FewShotData": "vlprompt.data",
    "Head": "vlprompt.io.head",
    "PromptMethod": "vlprompt.methods",
    "PromptModule": "vlprompt.engine.module",
    "Run": "vlprompt.runs.run",
    "VlpromptError": "vlprompt.errors",
    "create_method": "vlprompt.methods",
    "list_backbones": "vlprompt.backbone",
    "list_datasets": "vlprompt.datasets",
    "list_methods": "vlprompt.methods",
    "load_backbone": "vlprompt.backbone",
    "load_dataset": "vlprompt.datasets",
    "load_head": "vlprompt.io.head",
    "load_pairs": "vlprompt.pairs",
    "register": "vlprompt.methods",
    "train": "vlprompt.runs.run",
}

__all__ = [
    "Backbone",
    "FewShotData",
    "Head",
    "PromptMethod",
    "PromptModule",
    "Run",
    "VlpromptError",
    "__version__",
    "create_method",
    "list_backbones",
    "list_datasets",
    "list_methods",
    "load_backbone",
    "load_dataset",
    "load_head",
    "load_pairs",
    "register",
    "train",
]

if TYPE_CHECKING:
    from vlprompt.backbone import Backbone, list_backbones, load_backbone
    from vlprompt.data import FewShotData
    from vlprompt.datasets import list_datasets, load_dataset
    from vlprompt.engine.module import PromptModule
    from vlprompt.errors import VlpromptError
    from vlprompt.io.head import Head, load_head
    from vlprompt.methods import PromptMethod, create_method, list_methods, register
    from vlprompt.pairs import load_pairs
    from vlprompt.runs.run import Run, train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
