"""``vlprompt data check``: all problems of a data set, without torch, in seconds unless all images are decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprompt._files import file_checksum, sha256_lines
from vlprompt.datasets.card import Card
from vlprompt.datasets.images import FileSource, ImageSource, reading_of, tag_and_alpha
from vlprompt.datasets.readers import new_report, read_into
from vlprompt.datasets.readers.checks import alike
from vlprompt.datasets.readers.images import truncated_files
from vlprompt.datasets.records import SPLITS, Sample, SplitLists, labels_of
from vlprompt.datasets.report import Problem, Report
from vlprompt.errors import DataError

_SMALLEST_SIDE = 8
#: Most shots per class in the published protocols.
_MOST_SHOTS = 16


@dataclass
class Checked:
    """Result of :func:`check`.

    Attributes:
        name: Name of the data set.
        base: The data set's folder.
        problems: All problems.
        facts: Counts and hashes of the data that could be read.
        remedy: What to do about the problems.
    """

    name: str
    base: Path
    problems: list[Problem]
    facts: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""

    @property
    def failed(self) -> bool:
        """Whether the data set cannot be used."""
        return any(not problem.warning for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        problems = [
            {"code": problem.code, "severity": "warning" if problem.warning else "error", "text": problem.text}
            for problem in self.problems
        ]
        return {"name": self.name, "folder": str(self.base), "ok": not self.failed, "problems": problems, **self.facts}


def check(
    card: Card,
    root: str | Path | None = None,
    *,
    decode: bool = False,
    hash_images: bool = False,
    strict: bool = False,
) -> Checked:
    """Read a data set and collect all its problems (rules S01 to S22).

    Args:
        card: Its card, with the split to check.
        root: The data root.
        decode: Decode every image (rule S16); otherwise only files that look truncated are decoded.
        hash_images: Compare the bytes of training and test images (rule S12).
        strict: Treat sizes that differ from the card's as errors (rule S13).
    """
    report = new_report(card, card.base(root))
    lists: SplitLists | None = None
    try:
        lists = read_into(card, root, report)
    except DataError as error:
        if not report.failed:
            report.error("S15", str(error))
    if lists is not None:
        _check_images(card, lists, report, decode, hash_images)
    if text := report.passed.text():
        report.warn("S21", text)
    problems = report.problems
    if strict:
        problems = [Problem(entry.code, entry.text, entry.warning and entry.code != "S13") for entry in problems]
    facts = {} if lists is None else _facts(card, lists, report)
    return Checked(card.name, card.base(root), problems, facts, report.remedy)


def _check_images(card: Card, lists: SplitLists, report: Report, decode: bool, hash_images: bool) -> None:
    sources = {sample.id: sample.source for split in SPLITS for sample in getattr(lists, split)}
    damaged = dict(_undecodable(sources) if decode else truncated_files(sources.items()))
    if decode or card.own:
        report.facts["pixels"] = _pixels(card, sources, damaged)
    report.errors("S16", [f"{name}: {text}" for name, text in damaged.items()])
    if hash_images:
        report.problems += _shared_files(lists)
    shots = Counter(label for sample in lists.train for label in labels_of(sample))
    short = [label for label in range(len(lists.class_names)) if 0 < shots[label] < _MOST_SHOTS]
    if short and lists.train and not card.packaged:
        fewest = min(shots[label] for label in short)
        count = "1 class has" if len(short) == 1 else f"{len(short)} classes have"
        text = f"{count} fewer than {_MOST_SHOTS} training images, the fewest {fewest}; dassl-v1 takes all of them"
        report.warn("S17", text)
    for group in alike(lists.class_names):
        report.warn("S10", f"{group} give the same prompt, so that text cannot tell these classes apart")
    for name in lists.class_names:
        if ("/" in name or "\\" in name) and name not in card.classes.names:
            report.warn("S19", f"class name {name!r} has a path separator; it is kept for prompts")


def _undecodable(sources: dict[str, ImageSource]) -> list[tuple[str, str]]:
    def decode(item: tuple[str, ImageSource]) -> tuple[str, str] | None:
        name, source = item
        try:
            width, height = source.open().size
        except DataError as error:
            return name, str(error)
        small = min(width, height) < _SMALLEST_SIDE
        return (name, f"{width} x {height} pixels; both sides need {_SMALLEST_SIDE}") if small else None

    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [problem for problem in pool.map(decode, sources.items()) if problem is not None]


def _pixels(card: Card, sources: Mapping[str, ImageSource], damaged: dict[str, str]) -> dict[str, Any]:
    """Return how many images have an orientation tag and how many transparent pixels, and how both are read.

    Images that cannot be opened are added to ``damaged``.
    """

    def look(source: ImageSource) -> tuple[bool, bool] | str:
        try:
            return tag_and_alpha(source)
        except DataError as error:
            return str(error)

    names = [name for name in sources if name not in damaged]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looked = dict(zip(names, pool.map(look, map(sources.__getitem__, names)), strict=True))
    damaged |= {name: facts for name, facts in looked.items() if isinstance(facts, str)}
    found = [facts for facts in looked.values() if not isinstance(facts, str)]
    reading = reading_of(own=card.own)
    return {
        "turned": sum(turned for turned, _ in found),
        "transparent": sum(transparent for _, transparent in found),
        "orientation": reading.orientation,
        "background": reading.background,
    }


def _shared_files(lists: SplitLists) -> list[Problem]:
    """Rule S12: warn about identical files in train or val and in test."""
    trained = _hashes([*lists.train, *lists.val])
    problems = []
    for digest, name in _hashes(lists.test).items():
        other = trained.get(digest)
        if other is not None and other != name:
            problems.append(Problem("S12", f"{name} (test) and {other} are the same file", warning=True))
    return problems


def _hashes(samples: Iterable[Sample]) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample.source, FileSource):
            hashes.setdefault(file_checksum(sample.source.path), sample.id)
    return hashes


def _facts(card: Card, lists: SplitLists, report: Report) -> dict[str, Any]:
    return {
        "split": card.split,
        "classes": len(lists.class_names),
        **{split: len(getattr(lists, split)) for split in SPLITS},
        "class_names_sha256": sha256_lines(lists.class_names),
        "content_sha256": lists.content_sha256() if not report.failed else None,
        "published": report.facts.get("published"),
        "passed_over": report.passed.counts(),
        "pixels": report.facts.get("pixels"),
    }
