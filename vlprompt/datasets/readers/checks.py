"""Checks that several readers share, and the type of a reader."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlprompt.datasets.card import Card, imagenet_names
from vlprompt.datasets.records import SPLITS, SplitLists
from vlprompt.datasets.report import Report

_LARGEST_LABEL = 100_000
_IDENTIFIERS = {
    "numbers": re.compile(r"[0-9]+([._-][0-9]+)*"),
    "WordNet ids": re.compile(r"n[0-9]{8}"),
    "hexadecimal ids": re.compile(r"(?=.*[0-9])[0-9a-fA-F]{12,}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
}


def label_problem(label: object) -> str | None:
    """Return why ``label`` cannot be a class index, or ``None`` if it can (rule S06)."""
    if isinstance(label, bool) or not isinstance(label, int):
        shown = f"{label!r}"
        return f"label {shown[:60]} is a {type(label).__name__}; labels are whole numbers from 0"
    if not 0 <= label < _LARGEST_LABEL:
        return f"label {str(label)[:30]} is out of range; labels run from 0 and stay below {_LARGEST_LABEL:,}"
    return None


def check_names(names: Sequence[str], report: Report, card: Card) -> None:
    """Rules S10 and S22: two labels have the same name, or names are numbers or identifiers.

    Equal names are an error in data of the user, whose later class would never be predicted, and a warning in a
    published data set (ImageNet has two). Numbers and identifiers of the user's data are a warning.
    """
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if name and first.setdefault(name, label) != label:
            text = f"labels {first[name]} and {label} are both {name!r}"
            if card.own:
                report.error("S10", f"{text}; the prompts would be equal, and the later class never predicted")
            else:
                report.warn("S10", text)
    if card.own and (text := identifiers(names)):
        report.warn("S22", text)


def alike(names: Sequence[str]) -> list[str]:
    """Return the groups of names that differ only in case, underscores, spaces or Unicode form.

    This is the rule of CLIP's tokenizer without the tokenizer; methods compare token rows
    (:func:`vlprompt.prompts.words.check_distinct`).
    """
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        plain = " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFKC", name).lower().strip(" _")))
        groups.setdefault(plain, {})[name] = None
    return [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]


def identifiers(names: Sequence[str]) -> str:
    """Return a remark if at least half of the names are numbers, WordNet ids or hexadecimal ids; else an empty text."""
    for kind, pattern in _IDENTIFIERS.items():
        found = [name for name in names if pattern.fullmatch(name)]
        if found and 2 * len(found) >= len(names):
            known = imagenet_names() if kind == "WordNet ids" else {}
            example = {name: known.get(name, "NAME") for name in found[:2]}
            return (
                f"{len(found):,} of {len(names):,} class names are {kind} ({', '.join(found[:3])}), which prompts take "
                f"literally. Give names: a file classes.json in the folder of images, "
                f"{json.dumps(example, ensure_ascii=False)[:-1]}, ...}}"
            )
    return ""


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
