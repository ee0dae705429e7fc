"""Cache of decoded images in memory that all loader processes share."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlprompt._memory import free_memory
from vlprompt.data.transforms import Pixels, Transform
from vlprompt.datasets.records import Sample

#: Default limit, in bytes, of decoded images that a split keeps in a process and its workers.
KEEP_BYTES = 2 * 2**30


class PixelCache:
    """Pixels of samples under a transform; each image is decoded once while the cache has room.

    The ``center`` transform caches transformed pixels. A random transform caches the decoded image, because crops are
    taken from it. Images that do not fit are decoded every time.

    Without workers, decoded objects are kept. With workers, pixels are in anonymous shared memory, which is reserved at
    once but allocated as it is filled: forked workers read and fill the same pages without copies. Workers that are not
    forked cache nothing.

    Args:
        samples: The images.
        transform: Transform of the images.
        keep: Limit in bytes, reduced to half of the free memory; 0 caches nothing.
        workers: Number of processes that decode; each fills a separate section of the memory, without locks.
    """

    def __init__(self, samples: Sequence[Sample], transform: Transform, keep: int = 0, workers: int = 0) -> None:
        self.samples, self.transform = samples, transform
        keep = min(keep, free_memory() // 2)
        self._kept: _Local | _Shared | None = None
        if keep and not workers:
            self._kept = _Local(keep)
        elif keep:
            # A system without memory overcommit may refuse.
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
        image = self.samples[position].source.open()
        pixels = self.transform.pixels(image)
        if self._kept is not None:
            self._kept.put(position, image if self.transform.random else pixels)
        return pixels

    def kept(self) -> int:
        """Return the number of cached images."""
        return 0 if self._kept is None else self._kept.count()


class _Local:
    """Images or pixels of one process."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.images: dict[int, Any] = {}

    def get(self, position: int) -> Any:
        return self.images.get(position)

    def put(self, position: int, image: Any) -> None:
        # Pillow uses 4 bytes per pixel.
        size = image.size if isinstance(image, np.ndarray) else math.prod(image.size) * 4
        if size <= self.room:
            self.room -= size
            self.images[position] = image.copy() if isinstance(image, np.ndarray) else image

    def count(self) -> int:
        return len(self.images)


class _Shared:
    """Pixels stored contiguously in memory that forked processes share."""

    def __init__(self, room: int, number: int, sections: int) -> None:
        self.size, self.sections = room // sections, sections
        self.memory = np.frombuffer(mmap.mmap(-1, self.size * sections), dtype=np.uint8)
        table = np.frombuffer(mmap.mmap(-1, 8 * (4 * number + sections)), dtype=np.int64)
        self.filled, self.places = table[:sections], table[sections:].reshape(-1, 4)

    def get(self, position: int) -> Any:
        start, *shape = self.places[position].tolist()
        return self.memory[start : start + math.prod(shape)].reshape(shape) if shape[0] else None

    def put(self, position: int, image: Any) -> None:
        from torch.utils.data import get_worker_info

        pixels, worker = np.asarray(image), get_worker_info()
        section = worker.id % self.sections if worker is not None else 0
        filled = int(self.filled[section])
        if filled + pixels.size > self.size:
            return
        start = section * self.size + filled
        self.memory[start : start + pixels.size] = pixels.reshape(-1)
        self.filled[section] = filled + pixels.size
        # Written last: an entry with a shape is complete.
        self.places[position] = (start, *pixels.shape)

    def count(self) -> int:
        return int(np.count_nonzero(self.places[:, 1]))
