"""Data as tensors: views, batches, the feature store and the LightningDataModule.

The names below are loaded when first used, so that ``import vlprompt.data`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.data.features import FeatureStore, extract
    from vlprompt.data.module import FewShotData
    from vlprompt.data.samplers import EvalSampler, TrainSampler
    from vlprompt.data.transforms import describe_transform, test_transform, train_transform

_HOMES = {
    "features": ("FeatureStore", "extract"),
    "module": ("FewShotData",),
    "samplers": ("EvalSampler", "TrainSampler"),
    "transforms": ("describe_transform", "test_transform", "train_transform"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "EvalSampler",
    "FeatureStore",
    "FewShotData",
    "TrainSampler",
    "describe_transform",
    "extract",
    "test_transform",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vlprompt.data.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
