"""Several views of every image, as pixels; the views of a test image that a method uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vlprompt._random import derived_seed, hashed_number, seeded_random
from vlprompt.data.batches import Batch, ImageBatches
from vlprompt.data.pixel_cache import PixelCache
from vlprompt.data.samplers import Key
from vlprompt.data.transforms import Pixels, PreprocessLike, Transform, describe_transform
from vlprompt.datasets.images import ImageSource
from vlprompt.datasets.records import Sample
from vlprompt.errors import ConfigError, DataError
from vlprompt.needs import TestViews

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageBank(Protocol):
    """Interface of :class:`~vlprompt.generation.DiffusionBank` that views use."""

    @property
    def recipe_id(self) -> str:
        """Hash of everything that generated images depend on besides the source image."""

    def images(self, source: ImageSource, count: int) -> list[Image]:
        """Return the first ``count`` images generated from a source image."""


class RandomViews:
    """Views 1 to ``count`` of an image by a random transform.

    A view depends on the seed, the image's id and the view's number only.

    Args:
        preprocess: The backbone's preprocessing.
        kind: A random kind of :class:`~vlprompt.data.transforms.Transform`, or ``center`` with one view.
        count: Number of views.
        seed: Seed of the draws.
    """

    def __init__(self, preprocess: PreprocessLike, kind: str, count: int, seed: int) -> None:
        self.preprocess, self.transform, self.count, self.seed = preprocess, Transform(preprocess, kind), count, seed

    def shared(self) -> RandomViews:
        """Return the views to compute and store: 32 for a count of 31, 64 for 63, else the same number.

        Methods that count the test view among their views (TPT) and those that do not (DiffTPT) then share features.
        """
        rounded = -(-self.count // 16) * 16
        if rounded != self.count + 1:
            return self
        return RandomViews(self.preprocess, self.transform.kind, rounded, self.seed)

    def facts(self) -> dict[str, Any]:
        """Return description, number and seed of the views."""
        text = describe_transform(self.preprocess, self.transform.kind)
        return {"view": text, "views": self.count, "seed": self.seed}

    def pixels(self, sample: Sample, image: Image) -> Iterator[Pixels]:
        """Yield the pixels of each view; torch's generator keeps its state."""
        number = hashed_number(sample.id)
        for view in range(1, self.count + 1):
            with seeded_random(derived_seed(self.seed, number, view)):
                yield self.transform.pixels(image)


class GeneratedViews:
    """The first ``count`` generated images of an image, under the test transform (DiffTPT, ``difftpt_utils.py``)."""

    def __init__(self, preprocess: PreprocessLike, bank: ImageBank, count: int) -> None:
        self.preprocess, self.transform = preprocess, Transform(preprocess, "center")
        self.bank, self.count = bank, count

    def shared(self) -> GeneratedViews:
        """Return the views to compute and store: the same."""
        return self

    def facts(self) -> dict[str, Any]:
        """Return description, number and the bank's recipe."""
        text = describe_transform(self.preprocess, "center")
        return {"view": text, "views": self.count, "recipe": self.bank.recipe_id}

    def pixels(self, sample: Sample, image: Image) -> Iterator[Pixels]:
        """Yield the pixels of each view; raises DataError if the bank has too few images."""
        for generated in self.bank.images(sample.source, self.count):
            yield self.transform.pixels(generated)


class MultiViewImages(ImageBatches):
    """Batches of all views of an image, ``[b, V, 3, S, S]``; each image is decoded once for all views.

    Pixels are uint8. If a group has float32 pixels (AugMix), the batch is already normalised.

    Args:
        samples: The images.
        groups: Groups of views, concatenated in order.
        labels: Labels of all samples.
        positions: Positions of the samples that keys index; ``None`` for all.
        skip: Whether to skip unreadable images instead of raising.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        groups: Sequence[RandomViews | GeneratedViews],
        labels: Tensor,
        positions: Sequence[int] | None = None,
        *,
        skip: bool = False,
    ) -> None:
        super().__init__(PixelCache(samples, groups[0].transform), labels, positions, skip=skip)
        self.groups, self.views = groups, sum(group.count for group in groups)
        self.mixed = any(group.transform.mixed for group in groups)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        samples, transform = self.cache.samples, self.cache.transform
        kind = torch.float32 if self.mixed else torch.uint8
        images = torch.empty(len(keys), self.views, 3, transform.size, transform.size, dtype=kind)
        read, skipped = list[int](), list[int]()
        for _, index in keys:
            position = int(self.positions[index])
            sample = samples[position]
            try:
                image = sample.source.open()
            except DataError:
                if not self.skip:
                    raise
                skipped.append(position)
                continue
            views = (pixels for group in self.groups for pixels in group.pixels(sample, image))
            for target, pixels in zip(images.numpy()[len(read)], views, strict=True):
                np.copyto(target, pixels)
            read.append(position)
        images = images[: len(read)]
        images = transform.finish(images) if self.mixed else images
        batch = {"images": images, **self.batch(torch.tensor(read, dtype=torch.int64))}
        if self.skip:
            batch["skipped"] = torch.tensor(skipped, dtype=torch.int64)
        return batch


def additional_views(
    preprocess: PreprocessLike, views: TestViews, bank: ImageBank | None, seed: int
) -> list[RandomViews | GeneratedViews]:
    """Return the views of a test image besides the test view: crops, then generated images.

    Raises:
        ConfigError: If there are generated images but no bank.
    """
    groups: list[RandomViews | GeneratedViews] = []
    if views.crops:
        groups.append(RandomViews(preprocess, "augmix" if views.augmix else "crop", views.crops, seed))
    if views.generated:
        if bank is None:
            raise ConfigError(f"test_views has {views.generated} generated images: pass their bank, generated=.")
        groups.append(GeneratedViews(preprocess, bank, views.generated))
    return groups
