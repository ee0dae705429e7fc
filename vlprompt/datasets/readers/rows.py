"""Rows of archives of many images, which the readers of shards and of parquet files share."""

from __future__ import annotations

from dataclasses import dataclass

from vlprompt.datasets.images import ImageSource
from vlprompt.datasets.records import Label


@dataclass(frozen=True)
class Row:
    """An image of a shard: its key within the split, its label or labels, and where it is."""

    key: str
    label: Label
    source: ImageSource


@dataclass
class Rows:
    """The images of a split, and how many values its multi-label vectors have (empty: one label an image)."""

    rows: list[Row]
    widths: list[int]
    names: list[str]
