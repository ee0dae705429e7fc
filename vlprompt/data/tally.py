"""What happened to the images of a run: how many were encoded, and which could not be read."""

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
    """Counts since a moment.

    Attributes:
        encoded: Images that were encoded for the feature store.
        skipped: Ids of the images that were left out because they cannot be read, by split, each once.
    """

    encoded: int = 0
    skipped: dict[str, dict[str, None]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the counts of all processes as plain JSON values; where there are several, each has to call this.

        Returns:
            ``{"encoded": n, "skipped": {"train": n, "val": n, "test": n, "ids": [the first 20]}}``
        """
        encoded, skipped = 0, dict[str, dict[str, None]](train={}, val={}, test={})
        for other in gathered(self):
            encoded += other.encoded
            for split, ids in other.skipped.items():
                skipped[split].update(ids)
        names = list(dict.fromkeys(name for found in skipped.values() for name in sorted(found)))
        counts = {split: len(found) for split, found in skipped.items()}
        return {"encoded": encoded, "skipped": {**counts, "ids": names[:_SHOWN]}}


#: The whole process's, and those opened by :func:`tally`.
_OPEN = [Tally()]


def images_encoded() -> int:
    """Return how many images this process has encoded for feature stores."""
    return _OPEN[0].encoded


def count_encoded(number: int) -> None:
    """Add ``number`` encoded images to every open tally."""
    for one in _OPEN:
        one.encoded += number


def count_skipped(split: str, ids: Iterable[str]) -> None:
    """Note images of ``split`` that were left out in every open tally."""
    names = dict.fromkeys(ids)
    for one in _OPEN:
        one.skipped.setdefault(split, {}).update(names)


@contextmanager
def tally() -> Iterator[Tally]:
    """Count what happens inside; afterwards one warning names the images that this process left out."""
    counts = Tally()
    _OPEN.append(counts)
    try:
        yield counts
    finally:
        _OPEN[:] = [one for one in _OPEN if one is not counts]
    names = sorted({name for ids in counts.skipped.values() for name in ids})
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"Images that cannot be read were left out: {len(names)} ({', '.join(names[:3])}{more}). Results are over "
            "the images that could be read; data.on_bad_image error stops at the first.",
            stacklevel=1,
        )
