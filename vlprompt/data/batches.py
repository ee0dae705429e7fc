"""Batched datasets of images or cached features, and their DataLoader."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlprompt._random import derived_seed, seeded_random
from vlprompt.data.pixel_cache import PixelCache
from vlprompt.data.samplers import Key
from vlprompt.data.transforms import Pixels
from vlprompt.datasets.records import Sample
from vlprompt.errors import DataError

Batch = dict[str, Tensor]
#: Below this number of images, decoding is faster than starting worker processes.
FEW_IMAGES = 256


def automatic_workers(images: int, processes: int = 1) -> int:
    """Return the number of loader processes: 0 below 256 images, else up to 8 with the cores shared evenly."""
    if images < FEW_IMAGES:
        return 0
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return min(8, cores // processes)


def labels_of(samples: Sequence[Sample], classes: int, multilabel: bool) -> Tensor:
    """Return labels: int64 ``[N]``, or for ``multilabel`` float32 ``[N, C]`` with 1 for each label of an image."""
    if not multilabel:
        return torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    labels = torch.zeros(len(samples), classes)
    for row, sample in zip(labels, samples, strict=True):
        label: Any = sample.label
        row[list(label) if isinstance(label, tuple) else [label]] = 1.0
    return labels


class _Keyed(Dataset[Batch]):
    """Base class of batched datasets: labels and the positions of the samples in use.

    Args:
        labels: ``[N]`` or ``[N, C]``, labels of all samples.
        positions: Positions of the samples that keys index; ``None`` for all.
    """

    def __init__(self, labels: Tensor, positions: Sequence[int] | None = None) -> None:
        self.labels = labels
        self.positions = torch.arange(len(labels)) if positions is None else torch.tensor(positions, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, positions: Tensor) -> Batch:
        """Return the labels and the index of the samples at ``positions``."""
        return {"labels": self.labels[positions], "index": positions}


class FeatureBatches(_Keyed):
    """Batches of cached features; ``rows(epoch)`` returns the features ``[N, D]`` of an epoch."""

    def __init__(self, rows: Callable[[int], Tensor], labels: Tensor, positions: Sequence[int] | None = None) -> None:
        super().__init__(labels, positions)
        self.rows = rows

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        positions = self.positions[[index for _, index in keys]]
        return {"features": self.rows(keys[0][0])[positions], **self.batch(positions)}


class ImageBatches(_Keyed):
    """Batches of uint8 images ``[b, 3, S, S]``, not normalised.

    With ``skip``, unreadable images are omitted and their positions are in ``skipped``.

    Args:
        cache: Source of the pixels.
        labels: Labels of all samples.
        positions: Positions of the samples that keys index; ``None`` for all.
        seed: Seed of a random transform, ``None`` for the ``center`` transform.
        skip: Whether to skip unreadable images instead of raising.
    """

    def __init__(
        self,
        cache: PixelCache,
        labels: Tensor,
        positions: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(labels, positions)
        self.cache, self.seed, self.skip = cache, seed, skip

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        size = self.cache.transform.size
        images = torch.empty(len(keys), 3, size, size, dtype=torch.uint8)
        read: list[int] = []
        skipped: list[int] = []
        for epoch, index in keys:
            position = int(self.positions[index])
            try:
                images.numpy()[len(read)] = self._pixels(epoch, position)
            except DataError:
                if not self.skip:
                    raise
                skipped.append(position)
                continue
            read.append(position)
        batch = {"images": images[: len(read)], **self.batch(torch.tensor(read, dtype=torch.int64))}
        if self.skip:
            batch["skipped"] = torch.tensor(skipped, dtype=torch.int64)
        return batch

    def _pixels(self, epoch: int, position: int) -> Pixels:
        if self.seed is None:
            return self.cache.pixels(position)
        with seeded_random(derived_seed(self.seed, epoch, position)):
            return self.cache.pixels(position)


class Loader(DataLoader[Batch]):
    """A DataLoader whose error texts do not depend on whether a worker process raised them.

    ``on_batch`` is called in this process with every batch and returns the batch to yield, or ``None`` to drop it.
    Worker processes start when the first batch is requested, because Lightning creates the iterator before it sets the
    epoch of a resumed run.

    ``scales`` are the scales of single batches by number; the others keep that of :func:`make_loader`.
    """

    scales: Mapping[int, float] = {}
    on_batch: Callable[[Batch], Batch | None] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with named_errors():
            for number, batch in enumerate(super().__iter__()):
                if number in self.scales:
                    batch["scale"] = torch.tensor(self.scales[number])
                kept = batch if self.on_batch is None else self.on_batch(batch)
                if kept is not None:
                    yield kept


def make_loader(
    dataset: FeatureBatches | ImageBatches,
    sampler: Sampler[Key] | Sequence[Key],
    batch_size: int | None,
    workers: int,
    *,
    scale: float = 1.0,
    persistent: bool = False,
) -> Loader:
    """Return a loader of the batches of ``dataset``, each with ``scale``, in pinned memory if there is a GPU.

    With ``batch_size=None``, every key is a batch.
    """
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        # Cached pixels are in memory that forked workers share; on Linux, code in workers is safe after a fork.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=persistent and workers > 0,
        collate_fn=partial(_with_scale, scale=scale),
        pin_memory=torch.cuda.is_available(),
    )


def _with_scale(batch: Batch, scale: float) -> Batch:
    return {**batch, "scale": torch.tensor(scale)}


@contextmanager
def named_errors() -> Iterator[None]:
    """Remove the traceback that a DataLoader worker process adds to the text of a DataError."""
    marker = f"{DataError.__module__}.{DataError.__qualname__}: "
    try:
        yield
    except DataError as error:
        if marker not in str(error):
            raise
        raise DataError(str(error).rpartition(marker)[2].strip()) from None
