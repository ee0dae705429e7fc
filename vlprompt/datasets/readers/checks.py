"""Checks that several readers share, and the type of a reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlprompt.datasets.card import Card
from vlprompt.datasets.records import SPLITS, SplitLists
from vlprompt.datasets.report import Report

_LARGEST_LABEL = 100_000


def label_problem(label: object) -> str | None:
    """Return why ``label`` cannot be a class index, or ``None`` if it can (rule S06)."""
    if isinstance(label, bool) or not isinstance(label, int):
        shown = f"{label!r}"
        return f"label {shown[:60]} is a {type(label).__name__}; labels are whole numbers from 0"
    if not 0 <= label < _LARGEST_LABEL:
        return f"label {str(label)[:30]} is out of range; labels run from 0 and stay below {_LARGEST_LABEL:,}"
    return None


def check_names(names: list[str], report: Report) -> None:
    """Rule S10: warn if two labels have the same name."""
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if name and first.setdefault(name, label) != label:
            report.warn("S10", f"labels {first[name]} and {label} are both {name!r}")


def check_duplicates(paths: dict[str, list[Any]], same_images: bool, report: Report) -> None:
    """Rule S11: no image occurs twice in a split, nor, unless ``same_images``, in two splits."""
    owner: dict[str, str] = {}
    for split in SPLITS:
        seen: set[str] = set()
        for entry in paths[split]:
            if entry is None:
                continue
            if entry in seen:
                report.error("S11", f"{entry} is twice in {split}")
            elif entry in owner and not same_images:
                report.error("S11", f"{entry} is in {owner[entry]} and in {split}")
            seen.add(entry)
            owner.setdefault(entry, split)


Reader = Callable[[Card, Path, Report], SplitLists]
