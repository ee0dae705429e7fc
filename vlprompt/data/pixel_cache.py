"""Decoded pictures, kept in memory that every loader process shares."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlprompt.data.transforms import Pixels, Transform
from vlprompt.datasets.records import Sample

#: Bytes of decoded pictures that a split keeps at most in a process and its workers, unless it is told otherwise.
KEEP_BYTES = 2 * 2**30


class PixelCache:
    """The pixels of samples under a view; each picture is decoded once as long as there is room.

    For the center view the finished pixels are kept, for the random view the picture as decoded, because crops are cut
    from the original. What does not fit is decoded again every time.

    Without workers the decoded objects themselves are held. With workers the pixels lie in anonymous shared memory,
    reserved at once and taken up as it is filled: workers that are forked see and fill the same pages, and nothing is
    copied per worker. Workers that are not forked keep nothing.

    Args:
        samples: Where the pictures come from.
        transform: Makes the pixels.
        keep: Bytes to keep at most; not more than half of the memory that is free. 0 keeps nothing.
        workers: Processes that will decode; each fills a part of its own of the memory, so none waits for another.
    """

    def __init__(self, samples: Sequence[Sample], transform: Transform, keep: int = 0, workers: int = 0) -> None:
        self.samples, self.transform = samples, transform
        keep = min(keep, _free_memory() // 2)
        self._kept: _Held | _Shared | None = None
        if keep and not workers:
            self._kept = _Held(keep)
        elif keep:
            # A system that promises no more memory than it has may refuse.
            with contextlib.suppress(OSError, ValueError, OverflowError):
                self._kept = _Shared(keep, len(samples), workers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def pixels(self, position: int) -> Pixels:
        """Return uint8 ``[3, size, size]`` of the sample at ``position``.

        Raises:
            DataError: If the image cannot be read.
        """
        kept = None if self._kept is None else self._kept.get(position)
        if kept is not None:
            return self.transform.pixels(kept) if self.transform.random else kept
        picture = self.samples[position].source.open()
        pixels = self.transform.pixels(picture)
        if self._kept is not None:
            self._kept.put(position, picture if self.transform.random else pixels)
        return pixels

    def kept(self) -> int:
        """Return how many pictures are kept."""
        return 0 if self._kept is None else self._kept.count()


class _Held:
    """Pictures and pixels as they are, in one process."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[int, Any] = {}

    def get(self, position: int) -> Any:
        return self.held.get(position)

    def put(self, position: int, picture: Any) -> None:
        # Pillow takes 4 bytes for a pixel.
        size = picture.size if isinstance(picture, np.ndarray) else math.prod(picture.size) * 4
        if size <= self.room:
            self.room -= size
            self.held[position] = picture.copy() if isinstance(picture, np.ndarray) else picture

    def count(self) -> int:
        return len(self.held)


class _Shared:
    """Pixels one behind the other in memory that forked processes share."""

    def __init__(self, room: int, number: int, parts: int) -> None:
        self.size, self.parts = room // parts, parts
        self.memory = np.frombuffer(mmap.mmap(-1, self.size * parts), dtype=np.uint8)
        table = np.frombuffer(mmap.mmap(-1, 8 * (4 * number + parts)), dtype=np.int64)
        self.filled, self.places = table[:parts], table[parts:].reshape(-1, 4)

    def get(self, position: int) -> Any:
        start, *shape = self.places[position].tolist()
        return self.memory[start : start + math.prod(shape)].reshape(shape) if shape[0] else None

    def put(self, position: int, picture: Any) -> None:
        from torch.utils.data import get_worker_info

        pixels, worker = np.asarray(picture), get_worker_info()
        part = worker.id % self.parts if worker is not None else 0
        filled = int(self.filled[part])
        if filled + pixels.size > self.size:
            return
        start = part * self.size + filled
        self.memory[start : start + pixels.size] = pixels.reshape(-1)
        self.filled[part] = filled + pixels.size
        # Last: a place with a shape is complete.
        self.places[position] = (start, *pixels.shape)

    def count(self) -> int:
        return int(np.count_nonzero(self.places[:, 1]))


def _free_memory() -> int:
    """Return the bytes of memory that programs can still get."""
    table = Path("/proc/meminfo")
    if table.is_file():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 2 * KEEP_BYTES
