"""Features of many views of every image, computed once and kept in the feature store."""

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
from vlprompt.data.multi_view import Drawn, Generated, MultiViewImages
from vlprompt.data.samplers import Key
from vlprompt.datasets.records import Sample
from vlprompt.errors import DataError

#: Views that one entry of the store holds at most: what a killed run computes again.
BLOCK_VIEWS = 4096


@dataclass(frozen=True)
class ViewRows:
    """Features of ``count`` views of N images, in blocks that are maps of the store's files.

    Attributes:
        blocks: Features ``[n, V, D]``, V at least ``count``; all but the last of as many images.
        count: Views that were asked for.
        missing: Positions of images that could not be read; their rows are zeros.
    """

    blocks: tuple[Tensor, ...]
    count: int
    missing: tuple[int, ...]

    def of(self, positions: Tensor) -> Tensor:
        """Return the features ``[b, count, D]`` of the images at ``positions`` ``[b]``; only these are read."""
        size = len(self.blocks[0])
        rows = [self.blocks[place // size][place % size, : self.count] for place in positions.tolist()]
        return torch.stack(rows) if rows else self.blocks[0][:0, : self.count]

    def by_view(self) -> Tensor:
        """Return all features, ``[count, N, D]``."""
        return torch.cat([block[:, : self.count] for block in self.blocks]).transpose(0, 1).contiguous()


class MultiViewFeatures(FeatureBatches):
    """Batches of the features of several views, ``[b, V, D]``: the test view's and then those of ``parts``.

    Args:
        first: Features ``[N, D]`` of the test view.
        parts: Those of the other views.
        labels: Of all samples.
        positions: The samples that keys count; ``None`` for all.
    """

    def __init__(
        self, first: Tensor, parts: Sequence[ViewRows], labels: Tensor, positions: Sequence[int] | None = None
    ) -> None:
        super().__init__(lambda _: first, labels, positions)
        self.parts = parts

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        batch = super().__getitems__(keys)
        others = [part.of(batch["index"]) for part in self.parts]
        return {**batch, "features": torch.cat([batch["features"][:, None], *others], 1)}


class ViewEncoder:
    """Computes the features of many views, block by block, as far as the store does not have them.

    Each block is an entry of its own, so that a killed run loses at most the block it was at. The test view is no part
    of it: its features are those that every method shares, to the bit.

    Args:
        store: Where the features are kept.
        encode: Images ``[B, 3, H, W]`` to raw features ``[B, D]``.
        facts: What features depend on beside images and views: part of every key.
        batch_size: Images per call of ``encode``, about.
        device: Where ``encode`` wants its images.
        workers: The loader processes for a number of views.
        skip: Whether unreadable images are left out instead of raised.
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

    def rows(self, samples: Sequence[Sample], stamps: Sequence[str], views: Drawn | Generated) -> ViewRows:
        """Return the features of ``views``.

        Args:
            samples: The N images.
            stamps: A line for each that changes with its id and its bytes.
            views: The V views of each.

        Raises:
            DataError: An image that cannot be read, unless they are skipped; no image that can be read.
        """
        part, asked = views.shared(), views.count
        size = max(1, BLOCK_VIEWS // part.count)
        blocks: list[Tensor] = []
        missing: list[int] = []
        for start in range(0, len(samples), size):
            block = samples[start : start + size]
            key = {**self.facts, **part.facts(), "samples_sha256": sha256_lines(stamps[start : start + size])}
            rows = rows_or_error(self.store, key, partial(self._compute, block, part), block, self.skip)
            blocks.append(rows.features)
            missing += [start + position for position in rows.missing]
        width = max((block.shape[-1] for block in blocks), default=0)
        if not width:
            raise DataError(
                f"None of the {len(samples)} images can be read."
                if samples
                else "There are no images to compute features of."
            )
        # Of a block without any readable image even the number of features is not known.
        whole = (one if one.shape[-1] else one.new_zeros(*one.shape[:2], width) for one in blocks)
        return ViewRows(tuple(whole), asked, tuple(missing))

    def _compute(self, samples: Sequence[Sample], part: Drawn | Generated) -> Rows:
        images = MultiViewImages(samples, [part], torch.zeros(len(samples)), skip=self.skip)
        keys: list[Key] = [(0, index) for index in range(len(samples))]
        found: dict[int, Tensor] = {}
        size = max(1, round(self.batch_size / part.count))
        with torch.no_grad():
            for batch in make_loader(images, keys, size, self.workers(len(samples) * part.count)):
                if not len(batch["index"]):
                    continue
                numbers = batch["images"].flatten(0, 1).to(self.device)
                numbers = numbers if images.mixed else part.transform.finish(numbers)
                pieces = numbers.chunk(math.ceil(len(numbers) / self.batch_size))
                features = torch.cat([self.encode(piece).float().cpu() for piece in pieces])
                several = features.unflatten(0, (len(batch["index"]), part.count))
                found |= dict(zip(batch["index"].tolist(), several, strict=True))
        missing = tuple(position for position in range(len(samples)) if position not in found)
        width = next(iter(found.values())).shape[-1] if found else 0
        nothing = torch.zeros(part.count, width)
        return Rows(torch.stack([found.get(position, nothing) for position in range(len(samples))]), missing)


def rows_or_error(
    store: FeatureStore, key: Mapping[str, Any], compute: Callable[[], Rows], samples: Sequence[Sample], skip: bool
) -> Rows:
    """Return stored or computed rows of ``samples``.

    Raises:
        DataError: An image that cannot be read, unless ``skip``.
    """
    rows = store.rows(key, compute)
    if rows.missing and not skip:
        # Left out by a run that skips. Reading them again says what is wrong, or that they can be read by now.
        for position in rows.missing:
            samples[position].source.open()
        rows = store.rows(key, compute, anew=True)
    return rows
