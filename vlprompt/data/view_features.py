"""Features of several views of every image, computed once and kept in the feature store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlprompt._files import sha256_lines
from vlprompt.data.batches import Batch, FeatureBatches, make_loader
from vlprompt.data.features import FeatureStore, Rows
from vlprompt.data.multi_view import GeneratedViews, MultiViewImages, RandomViews
from vlprompt.data.samplers import Key
from vlprompt.datasets.records import Sample
from vlprompt.errors import DataError

#: Most views per entry of the store: a killed run repeats at most this many.
BLOCK_VIEWS = 4096


@dataclass(frozen=True)
class ViewRows:
    """Features of ``count`` views of N images, in blocks that are memory maps of the store's files.

    Attributes:
        blocks: Features ``[n, V, D]`` with V at least ``count``; all but the last have the same number of images.
        count: Number of requested views.
        missing: Positions of unreadable images; their rows are zeros.
    """

    blocks: tuple[Tensor, ...]
    count: int
    missing: tuple[int, ...]

    def of(self, positions: Tensor) -> Tensor:
        """Return the features ``[b, count, D]`` of the images at ``positions`` ``[b]``; only these rows are read."""
        size = len(self.blocks[0])
        rows = [self.blocks[place // size][place % size, : self.count] for place in positions.tolist()]
        return torch.stack(rows) if rows else self.blocks[0][:0, : self.count]

    def by_view(self) -> Tensor:
        """Return all features, ``[count, N, D]``."""
        return torch.cat([block[:, : self.count] for block in self.blocks]).transpose(0, 1).contiguous()


class MultiViewFeatures(FeatureBatches):
    """Batches of the features of several views, ``[b, V, D]``: the test view, then the views of ``groups``.

    Args:
        first: Features ``[N, D]`` of the test view.
        groups: Features of the other views.
        labels: Labels of all samples.
        positions: Positions of the samples that keys index; ``None`` for all.
    """

    def __init__(
        self, first: Tensor, groups: Sequence[ViewRows], labels: Tensor, positions: Sequence[int] | None = None
    ) -> None:
        super().__init__(lambda _: first, labels, positions)
        self.groups = groups

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        batch = super().__getitems__(keys)
        others = [group.of(batch["index"]) for group in self.groups]
        return {**batch, "features": torch.cat([batch["features"][:, None], *others], 1)}


class ViewEncoder:
    """Computes the features of several views in blocks and keeps them in the feature store.

    Each block is one entry, so that a killed run loses at most one block. The test view is excluded: its features are
    those that all methods share, bit for bit.

    Args:
        store: The feature store.
        encode: Images ``[B, 3, H, W]`` to raw features ``[B, D]``.
        facts: Everything that features depend on besides images and views; part of every key.
        batch_size: Approximate number of images per call of ``encode``.
        device: Device of the images passed to ``encode``.
        workers: Returns the number of loader processes for a number of views.
        skip: Whether to skip unreadable images instead of raising.
    """

    def __init__(
        self,
        store: FeatureStore,
        encode: Callable[[Tensor], Tensor],
        facts: Mapping[str, Any],
        batch_size: int,
        device: str | torch.device,
        workers: Callable[[int], int],
        skip: bool,
    ) -> None:
        self.store, self.encode, self.facts, self.skip = store, encode, facts, skip
        self.batch_size, self.device, self.workers = batch_size, device, workers

    def rows(self, samples: Sequence[Sample], stamps: Sequence[str], views: RandomViews | GeneratedViews) -> ViewRows:
        """Return the features of ``views``.

        Args:
            samples: The N images.
            stamps: For each image, a line that changes with its id and its bytes.
            views: The V views of each image.

        Raises:
            DataError: If an image cannot be read, unless ``skip``, or no image can be read.
        """
        stored = views.shared()
        size = max(1, BLOCK_VIEWS // stored.count)
        blocks: list[Tensor] = []
        missing: list[int] = []
        for start in range(0, len(samples), size):
            block = samples[start : start + size]
            key = {**self.facts, **stored.facts(), "samples_sha256": sha256_lines(stamps[start : start + size])}
            compute = partial(self._compute, block, stored)
            rows = rows_or_error(self.store, key, compute, block, self.skip)
            if rows.features.shape[1:2] != (stored.count,):  # not written by vlprompt
                rows = self.store.rows(key, compute, number=len(block), recompute=True)
            blocks.append(rows.features)
            missing += [start + position for position in rows.missing]
        width = max((block.shape[-1] for block in blocks), default=0)
        if not width:
            raise DataError(
                f"None of the {len(samples)} images can be read."
                if samples
                else "There are no images to compute features of."
            )
        # For a block without readable images, the number of features is unknown.
        filled = (block if block.shape[-1] else block.new_zeros(*block.shape[:2], width) for block in blocks)
        return ViewRows(tuple(filled), views.count, tuple(missing))

    def _compute(self, samples: Sequence[Sample], views: RandomViews | GeneratedViews) -> Rows:
        images = MultiViewImages(samples, [views], torch.zeros(len(samples)), skip=self.skip)
        keys: list[Key] = [(0, index) for index in range(len(samples))]
        features_of: dict[int, Tensor] = {}
        size = max(1, round(self.batch_size / views.count))
        with torch.no_grad():
            for batch in make_loader(images, keys, size, self.workers(len(samples) * views.count)):
                if not len(batch["index"]):
                    continue
                flat = batch["images"].flatten(0, 1).to(self.device)
                flat = flat if images.mixed else views.transform.finish(flat)
                chunks = flat.chunk(math.ceil(len(flat) / self.batch_size))
                features = torch.cat([self.encode(chunk).float().cpu() for chunk in chunks])
                by_image = features.unflatten(0, (len(batch["index"]), views.count))
                features_of |= dict(zip(batch["index"].tolist(), by_image, strict=True))
        missing = tuple(position for position in range(len(samples)) if position not in features_of)
        width = next(iter(features_of.values())).shape[-1] if features_of else 0
        zeros = torch.zeros(views.count, width)
        return Rows(torch.stack([features_of.get(position, zeros) for position in range(len(samples))]), missing)


def rows_or_error(
    store: FeatureStore, key: Mapping[str, Any], compute: Callable[[], Rows], samples: Sequence[Sample], skip: bool
) -> Rows:
    """Return stored or computed rows of ``samples``.

    Raises:
        DataError: If an image cannot be read, unless ``skip``.
    """
    rows = store.rows(key, compute, number=len(samples))
    if rows.missing and not skip:
        # A run with skip has stored them. Opening the images raises their errors, unless they are readable now.
        for position in rows.missing:
            samples[position].source.open()
        rows = store.rows(key, compute, number=len(samples), recompute=True)
    return rows
