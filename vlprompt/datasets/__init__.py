"""Data set cards, readers and few-shot draws; no tensors.

Names are imported on first use, which keeps ``import vlprompt.datasets`` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.datasets.card import Card, data_root
    from vlprompt.datasets.catalogue import card_class_names, find_card, list_datasets
    from vlprompt.datasets.images import FileSource, ZipSource, decode_rgb
    from vlprompt.datasets.records import Sample, SplitLists
    from vlprompt.datasets.shots import class_labels, fewshot, keep_labels
    from vlprompt.datasets.task import FewShotTask, load_dataset

_HOMES = {
    "card": ("Card", "data_root"),
    "catalogue": ("card_class_names", "find_card", "list_datasets"),
    "images": ("FileSource", "ZipSource", "decode_rgb"),
    "records": ("Sample", "SplitLists"),
    "shots": ("class_labels", "fewshot", "keep_labels"),
    "task": ("FewShotTask", "load_dataset"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Card",
    "FewShotTask",
    "FileSource",
    "Sample",
    "SplitLists",
    "ZipSource",
    "card_class_names",
    "class_labels",
    "data_root",
    "decode_rgb",
    "fewshot",
    "find_card",
    "keep_labels",
    "list_datasets",
    "load_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vlprompt.datasets.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
