"""Counts of encoded and skipped images of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vlprompt._dist import gathered

_SHOWN = 20


@dataclass
class Tally:
    """Counts since the tally was opened.

    Attributes:
        encoded: Number of images encoded for the feature store.
        skipped: Ids of unreadable images that were skipped, by split, each once.
    """

    encoded: int = 0
    skipped: dict[str, dict[str, None]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the counts of all processes as plain JSON values; with several processes, every process must call it.

        Returns:
            ``{"encoded": n, "skipped": {"train": n, "val": n, "test": n, "ids": [the first 20]}}``
        """
        encoded, skipped = 0, dict[str, dict[str, None]](train={}, val={}, test={})
        for other in gathered(self):
            encoded += other.encoded
            for split, ids in other.skipped.items():
                skipped[split].update(ids)
        names = list(dict.fromkeys(name for ids in skipped.values() for name in sorted(ids)))
        counts = {split: len(ids) for split, ids in skipped.items()}
        return {"encoded": encoded, "skipped": {**counts, "ids": names[:_SHOWN]}}


#: The tally of the process, and those opened by :func:`tally`.
_OPEN = [Tally()]


def images_encoded() -> int:
    """Return the number of images that this process has encoded for feature stores."""
    return _OPEN[0].encoded


def count_encoded(number: int) -> None:
    """Add ``number`` encoded images to every open tally."""
    for counts in _OPEN:
        counts.encoded += number


def count_skipped(split: str, ids: Iterable[str]) -> None:
    """Add skipped images of ``split`` to every open tally."""
    names = dict.fromkeys(ids)
    for counts in _OPEN:
        counts.skipped.setdefault(split, {}).update(names)


@contextmanager
def tally() -> Iterator[Tally]:
    """Count images in the context; on exit, one warning names the images that this process skipped."""
    counts = Tally()
    _OPEN.append(counts)
    try:
        yield counts
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not counts]
    names = sorted({name for ids in counts.skipped.values() for name in ids})
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"Unreadable images were skipped: {len(names)} ({', '.join(names[:3])}{more}). Results cover the readable "
            "images; data.on_bad_image error stops at the first unreadable image.",
            stacklevel=1,
        )
