"""Readers of data sets: a card and a folder to :class:`~vlprompt.datasets.records.SplitLists`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vlprompt.datasets.card import Card
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.records import SplitLists
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError

if TYPE_CHECKING:
    from vlprompt.datasets.readers.checks import Reader

#: Module and function of each reader; imported on first use, because torchvision is slow to import.
_HOMES = {
    "split_json": "split_json:read_split_json",
    "folder": "folder:read_folder",
    "list_file": "list_file:read_list_file",
    "torchvision": "torchvision:read_torchvision",
    "shards": "shards:read_shards",
    "pairs": "pairs:refuse_pairs",
}


def reader(name: str) -> Reader:
    """Return the reader of this name."""
    module, _, function = _HOMES[name].partition(":")
    read: Reader = getattr(import_module(f"vlprompt.datasets.readers.{module}"), function)
    return read


def read_dataset(card: Card, root: str | Path | None = None) -> SplitLists:
    """Read the complete data set of ``card`` under the data root ``root``.

    Raises:
        DataError: If it is missing (the text names the searched folder and how to get the data) or cannot be used;
            all problems that do not stop the reader are listed.
    """
    report = new_report(card, card.base(root))
    lists = read_into(card, root, report)
    report.finish()
    return lists


def new_report(card: Card, base: Path) -> Report:
    """Return an empty report of ``card`` under ``base``."""
    pages = ", ".join(dict.fromkeys(source.page for source in card.sources if source.page))
    remedy = f"Correct the files, or fetch the published ones: {pages or 'see the notes'}.\n{card.notes.strip()}"
    return Report(f"Data set {card.name!r} under {base}", remedy)


def read_into(card: Card, root: str | Path | None, report: Report) -> SplitLists:
    """Read like :func:`read_dataset`, but collect problems in ``report`` instead of raising them."""
    base = card.base(root)
    if not base.is_dir():
        raise DataError(missing_text(card, base, f"{base} ({'not a folder' if base.exists() else 'does not exist'})"))
    return reader(card.reader)(card, base, report)


__all__ = ["missing_text", "new_report", "read_dataset", "read_into", "reader"]
