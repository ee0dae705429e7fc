"""Reader of images with captions: a JSON object with ``image`` and ``caption`` on every line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vlprompt.data.cards import Card, find_card, list_datasets
from vlprompt.data.images import ImageSource
from vlprompt.data.options import PairsOptions
from vlprompt.data.paths import path_problem
from vlprompt.data.readers.images import find_images
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.report import Report
from vlprompt.errors import ConfigError, DataError, did_you_mean

_LONGEST_CAPTION = 2000


@dataclass(frozen=True)
class Pair:
    """An image and what is said about it.

    Attributes:
        id: POSIX path of the image.
        caption: The text.
        source: Where the pixels come from; ``source.open()`` gives a PIL RGB image.
        domain: The first folder of the image's path where the card names domains, else empty.
    """

    id: str
    caption: str
    source: ImageSource
    domain: str = ""


def load_pairs(name: str = "demo-pairs", *, root: str | Path | None = None) -> list[Pair]:
    """Return the image-caption pairs of a data set that has them, in file order.

    Args:
        name: Name or alias of the data set.
        root: Folder that holds the data sets; what is packaged needs none.

    Raises:
        ConfigError: The data set is unknown, or holds classes instead of captions.
        DataError: The file or images are missing, or lines cannot be used; all of them are listed.
    """
    card = find_card(name)
    if card.reader != "pairs":
        known = [other for other in list_datasets() if find_card(other).reader == "pairs"]
        raise ConfigError(
            f"{card.name!r} has classes, not captions.{did_you_mean(name, known)} Data sets with captions: "
            f"{', '.join(known)}. For classes use vlprompt.load_dataset({card.name!r})"
        )
    assert isinstance(card.options, PairsOptions)
    base = card.base(root)
    path = base / card.options.split_file
    if not path.is_file():
        raise DataError(missing_text(card, base, f"{path} (does not exist)"))
    report = Report(f"List of pairs {path}", "Correct the lines, or leave them out.")
    rows = _rows(path, report)
    sources = find_images(card, base, [image for image, _ in rows], report)
    report.finish()
    return [
        Pair(image, caption, sources[image], image.partition("/")[0] if card.domains else "") for image, caption in rows
    ]


def _rows(path: Path, report: Report) -> list[tuple[str, str]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"List of pairs {path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or set(row) != {"image", "caption"}:
            report.error("S03", f'line {number}: expected {{"image": PATH, "caption": TEXT}}, got {line[:60]!r}')
            continue
        image, caption = row["image"], row["caption"]
        if problem := path_problem(image):
            report.error("S04", f"line {number}: {problem}")
        elif not isinstance(caption, str) or not 0 < len(caption.strip()) <= _LONGEST_CAPTION:
            accepted = f"expected a text of 1 to {_LONGEST_CAPTION:,} characters"
            report.error("S03", f"line {number}: the caption is {str(caption)[:40]!r}; {accepted}")
        else:
            rows.append((image, caption))
    if not lines:
        report.error("S02", "there are no lines")
    return rows


def refuse_pairs(card: Card, base: Path, report: Report) -> NoReturn:
    """Say that ``card`` has no classes; :func:`vlprompt.load_dataset` asks for them."""
    del base, report
    raise ConfigError(
        f"{card.name!r} has captions, not classes: use vlprompt.load_pairs({card.name!r}). `vlprompt list datasets` "
        "shows all data sets."
    )
