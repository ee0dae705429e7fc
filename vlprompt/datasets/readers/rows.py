"""Rows of image archives, shared by the readers of shards and of parquet files."""

from __future__ import annotations

from dataclasses import dataclass

from vlprompt.datasets.images import ImageSource
from vlprompt.datasets.records import Label


@dataclass(frozen=True)
class Row:
    """An image of a shard: its key within the split, its label or labels, and its source."""

    key: str
    label: Label
    source: ImageSource


@dataclass
class Rows:
    """The images of a split, the lengths of its multi-label vectors (empty: one label per image), and class names."""

    rows: list[Row]
    widths: list[int]
    names: list[str]
