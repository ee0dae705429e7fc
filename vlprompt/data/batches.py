"""Whole batches by their keys, of images or of cached features, and the loader that carries them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
#: Fewer images than this are decoded sooner than worker processes start.
FEW_IMAGES = 256


def automatic_workers(images: int, processes: int = 1) -> int:
    """Return the loader processes for ``images``: none for fewer than 256, else up to 8, the cores shared evenly."""
    if images < FEW_IMAGES:
        return 0
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return min(8, cores // processes)


def labels_of(samples: Sequence[Sample], classes: int, multilabel: bool) -> Tensor:
    """Return the labels: int64 ``[N]``, or for ``multilabel`` float32 ``[N, C]`` with a 1 for each of an image's."""
    if not multilabel:
        return torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    labels = torch.zeros(len(samples), classes)
    for row, sample in zip(labels, samples, strict=True):
        several: Any = sample.label
        row[list(several) if isinstance(several, tuple) else [several]] = 1.0
    return labels


class _Keyed(Dataset[Batch]):
    """What images and features share: labels, and which samples take part.

    Args:
        labels: ``[N]`` or ``[N, C]``, of all samples.
        positions: The samples that keys count; ``None`` for all.
    """

    def __init__(self, labels: Tensor, positions: Sequence[int] | None = None) -> None:
        self.labels = labels
        self.positions = torch.arange(len(labels)) if positions is None else torch.tensor(positions, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, positions: Tensor) -> Batch:
        """Return labels and index of the samples at ``positions``."""
        return {"labels": self.labels[positions], "index": positions}


class FeatureBatches(_Keyed):
    """Batches of cached features; ``rows(epoch)`` gives those of an epoch ``[N, D]``."""

    def __init__(self, rows: Callable[[int], Tensor], labels: Tensor, positions: Sequence[int] | None = None) -> None:
        super().__init__(labels, positions)
        self.rows = rows

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        positions = self.positions[[index for _, index in keys]]
        return {"features": self.rows(keys[0][0])[positions], **self.batch(positions)}


class ImageBatches(_Keyed):
    """Batches of uint8 images ``[b, 3, S, S]``, not yet normalised.

    With ``skip``, images that cannot be read are left out and their positions are in ``skipped``.

    Args:
        cache: Where the pixels come from.
        labels: Of all samples.
        positions: The samples that keys count; ``None`` for all.
        seed: Seed of random views, ``None`` for the center view.
        skip: Whether unreadable images are left out instead of raised.
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
    """A DataLoader whose errors read the same whether they were raised here or in a worker process.

    ``arrived`` sees every batch in this process and returns it, changed, or ``None`` to leave it out. Worker processes
    are asked for batches only when the first one is: Lightning makes the iterator before it says which epoch a resumed
    run is in.
    """

    arrived: Callable[[Batch], Batch | None] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with named_errors():
            for batch in super().__iter__():
                kept = batch if self.arrived is None else self.arrived(batch)
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
    """Return a loader of ``dataset``'s batches, each with ``scale``; pinned memory where there is a GPU.

    With a ``batch_size`` of None every key is a batch of its own.
    """
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        # Pixels are kept in memory that forked workers share; on Linux nothing that a worker runs minds the fork.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=persistent and workers > 0,
        collate_fn=partial(_with_scale, scale=scale),
        pin_memory=torch.cuda.is_available(),
    )


def _with_scale(batch: Batch, scale: float) -> Batch:
    return {**batch, "scale": torch.tensor(scale)}


@contextmanager
def named_errors() -> Iterator[None]:
    """Strip the traceback that a DataLoader's worker process puts into the text of our errors."""
    marker = f"{DataError.__module__}.{DataError.__qualname__}: "
    try:
        yield
    except DataError as error:
        if marker not in str(error):
            raise
        raise DataError(str(error).rpartition(marker)[2].strip()) from None
