"""Few-shot lists: the images of a draw in JSON lines, with a hash.

The first line is a header that describes the draw; every other line is an image::

    {"schema": "vlprompt shots 1", "dataset": "caltech101", "split_sha256": "fb8d...", "sampler": "dassl-v1",
     "shots": 16, "seed": 1, "train": 1600, "val": 400, "sha256": "3b1c..."}
    {"part": "train", "path": "Faces/image_0313.jpg", "label": 0}

``sha256`` is the hash of all lines after the first, joined by LF. A list has no image data and no absolute paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._files import parse_json, read_text, sha256_lines
from vlprompt.datasets.card import Card
from vlprompt.datasets.paths import path_problem
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.records import Label, Sample, SplitLists
from vlprompt.datasets.report import Report

SCHEMA = "vlprompt shots 1"
_LARGEST_FILE = 256 * 2**20
_HEADER = ("dataset", "split_sha256", "sampler", "shots", "seed", "train", "val", "sha256")
PARTS = ("train", "val")


@dataclass(frozen=True)
class ShotList:
    """A few-shot list.

    Attributes:
        header: The first line: data set, split, sampler, shots, seed, counts and hash.
        rows: Path and label of every image of ``train`` and ``val``, in sampler order.
    """

    header: Mapping[str, Any]
    rows: Mapping[str, Sequence[tuple[str, Label]]]


def shot_list_text(
    train: Sequence[Sample],
    val: Sequence[Sample],
    *,
    dataset: str,
    split_sha256: str,
    sampler: str,
    shots: int,
    seed: int,
) -> str:
    """Return the text of the list file of a draw."""
    lines = [
        json.dumps({"part": split, "path": sample.id, "label": sample.label}, ensure_ascii=False)
        for split, samples in zip(PARTS, (train, val), strict=True)
        for sample in samples
    ]
    header = {
        "schema": SCHEMA, "dataset": dataset, "split_sha256": split_sha256, "sampler": sampler, "shots": shots,
        "seed": seed, "train": len(train), "val": len(val), "sha256": sha256_lines(lines),
    }  # fmt: skip
    return "\n".join([json.dumps(header, ensure_ascii=False), *lines]) + "\n"


def read_shot_list(path: Path) -> ShotList:
    """Read a list and check its format and hash.

    Raises:
        DataError: If it cannot be read, is not a few-shot list, or was changed; all problems are listed.
    """
    report = Report(f"Few-shot list {path}", "Make it again: vlprompt data shots NAME --shots N --seed K --export FILE")
    try:
        lines = read_text(path, _LARGEST_FILE).rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        report.error("S01", f"it cannot be read: {error}")
        report.stop()
    header = _object(lines[0])
    if header is None or header.get("schema") != SCHEMA:
        report.error("S18", f'the first line is not {{"schema": "{SCHEMA}", ...}}')
        report.stop()
    report.errors("S18", [f"the first line lacks {key!r}" for key in _HEADER if key not in header])
    rows: dict[str, list[tuple[str, Label]]] = {split: [] for split in PARTS}
    for number, line in enumerate(lines[1:], 2):
        row = _object(line)
        label = None if row is None else _label(row.get("label"))
        if row is None or set(row) != {"part", "path", "label"} or row["part"] not in PARTS or label is None:
            report.error("S03", f'line {number}: expected {{"part": "train" or "val", "path": ..., "label": ...}}')
        elif problem := path_problem(row["path"]):
            report.error("S04", f"line {number}: {problem}")
        else:
            rows[row["part"]].append((row["path"], label))
    if not report.failed and header["sha256"] != sha256_lines(lines[1:]):
        report.error("S18", "the lines do not have the hash that the first line states: the list was changed")
    report.finish()
    return ShotList(header, rows)


def use_shot_list(chosen: ShotList, lists: SplitLists, dataset: str, where: Path) -> tuple[list[Sample], list[Sample]]:
    """Return the training and validation samples that the list names, in its order.

    Images are looked up in the training and validation lists, never in the test list.

    Raises:
        DataError: If the list belongs to another data set or split, or an image is unknown or has another label (rule
            S18).
    """
    header = chosen.header
    remedy = f"Draw again: vlprompt data shots {dataset} --shots N --seed K --export FILE"
    report = Report(f"Few-shot list {where}", remedy)
    if header["dataset"] != dataset:
        report.error("S18", f"it is of data set {header['dataset']!r}, not of {dataset!r}")
        report.stop()
    if header["split_sha256"] is not None and header["split_sha256"] != lists.content_sha256():
        report.error("S18", "it was drawn from another split of the data set")
        report.stop()
    known = {sample.id: sample for sample in [*lists.val, *lists.train]}
    tested = {sample.id for sample in lists.test}
    drawn: dict[str, list[Sample]] = {split: [] for split in PARTS}
    for split, rows in chosen.rows.items():
        for path, label in rows:
            sample = known.get(path)
            if sample is None:
                kind = "is a test image" if path in tested else "is not in the data set"
                report.error("S18", f"{split}: {path} {kind}")
            elif sample.label != label:
                report.error("S18", f"{split}: {path} has label {label}, but {sample.label} in the data set")
            else:
                drawn[split].append(sample)
    if not drawn["train"]:
        report.error("S18", "it names no training images")
    report.finish()
    return drawn["train"], drawn["val"]


def import_published(path: Path, card: Card, root: str | Path | None = None) -> str:
    """Return the few-shot list for an index file that cross_modal_adaptation published (``shot_16-seed_1.json``).

    The file has, for ``train`` and ``val``, items with ``impath`` (with leading folders of its author), ``label`` and
    ``classname``.

    Raises:
        DataError: If the file is not such an index, or names images or labels that the data set does not have.
    """
    report = Report(
        f"Index file {path}", "Expected: an index file of github.com/linzhiqiu/cross_modal_adaptation, indices/."
    )
    try:
        content = parse_json(read_text(path, _LARGEST_FILE))
        rows = {
            split: [(item["impath"], item["label"], item["classname"]) for item in content[split]["data"]]
            for split in PARTS
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        report.error("S01", f"it cannot be read: {type(error).__name__}: {str(error)[:100]}")
        report.stop()
    lists = read_dataset(card, root)
    known = {sample.id: sample for sample in [*lists.val, *lists.train]}
    drawn: dict[str, list[Sample]] = {split: [] for split in PARTS}
    for split, items in rows.items():
        for impath, label, name in items:
            pieces = str(impath).split("/")
            endings = ("/".join(pieces[start:]) for start in range(len(pieces)))
            sample = next((known[ending] for ending in endings if ending in known), None)
            if sample is None:
                report.error("S18", f"{split}: {str(impath)[:200]} is not a training or validation image")
            elif sample.label != label or lists.class_names[label] != name:
                report.error("S18", f"{split}: {sample.id} has label {str(label)[:20]}, {str(name)[:60]!r}, there")
            else:
                drawn[split].append(sample)
    report.finish()
    shots, seed = _number(path.stem, "shot"), _number(path.stem, "seed")
    return shot_list_text(
        drawn["train"], drawn["val"], dataset=card.name, split_sha256=lists.content_sha256(), sampler="imported",
        shots=shots or -1, seed=seed,
    )  # fmt: skip


def _number(stem: str, key: str) -> int:
    """Return the number after ``key_`` in a stem like ``shot_16-seed_1``, or 0."""
    match = re.search(rf"{key}_([0-9]{{1,6}})", stem)
    return int(match.group(1)) if match else 0


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _label(value: Any) -> Label | None:
    if isinstance(value, list) and all(_label(label) is not None for label in value):
        return tuple(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
