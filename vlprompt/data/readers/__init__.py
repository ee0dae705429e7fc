"""Readers: from a card and a folder on disk to :class:`~vlprompt.data.records.SplitLists`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlprompt.data.cards import Card
from vlprompt.data.readers.fgvc import read_fgvc
from vlprompt.data.readers.folder import read_folder
from vlprompt.data.readers.imagenet import read_imagenet
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.readers.pairs import refuse_pairs
from vlprompt.data.readers.split_json import read_split_json
from vlprompt.data.records import SplitLists
from vlprompt.errors import DataError

READERS: dict[str, Callable[[Card, Path], SplitLists]] = {
    "split_json": read_split_json,
    "folder": read_folder,
    "fgvc": read_fgvc,
    "imagenet": read_imagenet,
    "pairs": refuse_pairs,
}


def read_dataset(card: Card, root: str | Path | None = None) -> SplitLists:
    """Read the whole data set of ``card`` under the data root ``root``.

    Raises:
        DataError: If it is missing (the text says where it was looked for and how to get it) or cannot be used.
    """
    base = card.base(root)
    if not base.is_dir():
        raise DataError(missing_text(card, base, f"{base} ({'not a folder' if base.exists() else 'does not exist'})"))
    return READERS[card.reader](card, base)


__all__ = ["READERS", "missing_text", "read_dataset"]
