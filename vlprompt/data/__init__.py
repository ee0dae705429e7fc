"""Data: cards, readers, few-shot draws, views, feature store and the LightningDataModule.

The names below are loaded when first used, so that ``import vlprompt.data`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.data.cards import Card, card_class_names, data_root, find_card, list_datasets
    from vlprompt.data.features import FeatureStore, extract
    from vlprompt.data.images import FileSource, ZipSource, decode_rgb
    from vlprompt.data.module import FewShotData
    from vlprompt.data.pair_features import caption_features, image_features
    from vlprompt.data.readers.pairs import Pair, load_pairs
    from vlprompt.data.records import Sample, SplitLists
    from vlprompt.data.samplers import EvalSampler, TrainSampler
    from vlprompt.data.shots import class_labels, fewshot, keep_labels
    from vlprompt.data.task import FewShotTask, load_dataset
    from vlprompt.data.views import describe_view, test_view, train_view

_HOMES = {
    "cards": ("Card", "card_class_names", "data_root", "find_card", "list_datasets"),
    "features": ("FeatureStore", "extract"),
    "shots": ("class_labels", "fewshot", "keep_labels"),
    "images": ("FileSource", "ZipSource", "decode_rgb"),
    "module": ("FewShotData",),
    "pair_features": ("caption_features", "image_features"),
    "readers.pairs": ("Pair", "load_pairs"),
    "records": ("Sample", "SplitLists"),
    "samplers": ("EvalSampler", "TrainSampler"),
    "task": ("FewShotTask", "load_dataset"),
    "views": ("describe_view", "test_view", "train_view"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Card",
    "EvalSampler",
    "FeatureStore",
    "FewShotData",
    "FewShotTask",
    "FileSource",
    "Pair",
    "Sample",
    "SplitLists",
    "TrainSampler",
    "ZipSource",
    "caption_features",
    "card_class_names",
    "class_labels",
    "data_root",
    "decode_rgb",
    "describe_view",
    "extract",
    "fewshot",
    "find_card",
    "image_features",
    "keep_labels",
    "list_datasets",
    "load_dataset",
    "load_pairs",
    "test_view",
    "train_view",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vlprompt.data.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
