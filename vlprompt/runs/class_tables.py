"""CSV files of a run with scores and counts by class, next to its results.

``per_class.csv`` has a row per class: its images, the images with it as answer, the correct ones, and precision, recall
and F1 in percent. They are empty for a class that is neither label nor answer; the mean of the others is the macro
average in the results. A precision without answers and a recall without images are 0. With several labels per image,
the answers are the labels with a probability above 0.8, and macro averages count empty entries as 0.

``confusion.csv`` has a row per label and answer that occur together, and the number of their images: the entries of the
confusion matrix that are not 0, those of a label in falling order. There is none for images with several labels.

The columns ``scores`` (``results`` or ``zeroshot``) and ``classes`` (``all``, ``base`` or ``new``) are keys of
``results.json``. Labels count from 0 in the order of the class names. Names are for readers: what a spreadsheet would
take for a formula has an apostrophe before it (OWASP: CSV injection), and what would control a terminal is escaped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlprompt._files import write_text
from vlprompt.engine.metrics import ClassCounts
from vlprompt.errors import printable

PER_CLASS, CONFUSION = "per_class.csv", "confusion.csv"
_SCORES = ("precision", "recall", "f1")
_PER_CLASS = ("scores", "classes", "label", "class", "images", "answers", "correct", *_SCORES)
_CONFUSION = ("scores", "classes", "label", "class", "answer", "answer_class", "images")
# The full-width forms are formulas as well. A spreadsheet may separate cells by any of these characters.
_FORMULA = re.compile(r"(^\s*|[,;|\t\"']\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")

NamedCounts = tuple[Sequence[str], ClassCounts]
"""The class names by label, and the counts."""


def write_class_tables(folder: Path, counts: Mapping[str, Mapping[str, NamedCounts]], prefix: str = "") -> None:
    """Write ``per_class.csv`` and, with one label per image, ``confusion.csv`` into ``folder``.

    Args:
        folder: The folder.
        counts: Names and counts by ``results`` or ``zeroshot``, then by ``all``, ``base`` or ``new``.
        prefix: What the names of the files begin with.
    """
    parts = [(scores, classes, *named) for scores, of_part in counts.items() for classes, named in of_part.items()]
    rows = (row for part in parts for row in _per_class_rows(*part))
    write_text(folder / f"{prefix}{PER_CLASS}", _csv(_PER_CLASS, rows))
    if any(found.mistakes is not None for *_, found in parts):
        rows = (row for part in parts for row in _confusion_rows(*part))
        write_text(folder / f"{prefix}{CONFUSION}", _csv(_CONFUSION, rows))


def class_tables(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that :func:`write_class_tables` wrote; runs of older versions have none."""
    return [path for name in (PER_CLASS, CONFUSION) if (path := folder / name).is_file()]


def _per_class_rows(scores: str, classes: str, names: Sequence[str], counts: ClassCounts) -> Iterable[list[object]]:
    columns = zip(counts.total, counts.answers, counts.correct, counts.scores(), strict=True)
    for label, (total, answers, correct, values) in enumerate(columns):
        cells = ["" if values is None else f"{values[name]:.4f}" for name in _SCORES]
        yield [scores, classes, label, names[label], total, answers, correct, *cells]


def _confusion_rows(scores: str, classes: str, names: Sequence[str], counts: ClassCounts) -> Iterable[list[object]]:
    by_pair = dict(counts.mistakes or {}) | {(row, row): count for row, count in enumerate(counts.correct) if count}
    for (label, answer), images in sorted(by_pair.items(), key=lambda found: (found[0][0], -found[1], found[0][1])):
        yield [scores, classes, label, names[label], answer, names[answer], images]


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_safe(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def _safe(text: str) -> str:
    """Return ``text`` as a cell that no spreadsheet takes for a formula and no terminal obeys."""
    return _FORMULA.sub(r"\1'", printable(text).replace("\n", " "))
