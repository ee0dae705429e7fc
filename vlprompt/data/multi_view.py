"""Many views of every image, as pixels; which views of a test image a method looks at."""

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
from vlprompt.views import TestViews

if TYPE_CHECKING:
    from PIL.Image import Image



class ImageBank(Protocol):
    """What views need to know of a :class:`~vlprompt.generation.DiffusionBank`."""

    @property
    def recipe_id(self) -> str:
        """The hash of everything that pictures are made from besides the image."""

    def pictures(self, source: ImageSource, count: int) -> list[Image]:
        """Return the first ``count`` pictures made of an image."""


class Drawn:
    """Views 1 to ``count`` of a kind; each depends on the seed, the image's id and the view's number alone.

    Args:
        preprocess: The backbone's preprocessing.
        kind: A kind of :class:`~vlprompt.data.transforms.Transform`; of ``center`` there is but one.
        count: Number of views.
        seed: Seed of the draws.
    """

    def __init__(self, preprocess: PreprocessLike, kind: str, count: int, seed: int) -> None:
        self.preprocess, self.transform, self.count, self.seed = preprocess, Transform(preprocess, kind), count, seed

    def shared(self) -> Drawn:
        """Return the views to compute and keep: 32 where 31 are asked for, and 64 for 63; else these.

        Methods that count the test view among theirs, as TPT does, and those that do not, as DiffTPT, then share them.
        """
        rounded = -(-self.count // 16) * 16
        return Drawn(self.preprocess, self.transform.kind, rounded, self.seed) if rounded == self.count + 1 else self

    def facts(self) -> dict[str, Any]:
        """Return description, number and seed."""
        text = describe_transform(self.preprocess, self.transform.kind)
        return {"view": text, "views": self.count, "seed": self.seed}

    def pixels(self, sample: Sample, picture: Image) -> Iterator[Pixels]:
        """Give the views' pixels; the state of torch's generator stays as it is."""
        number = hashed_number(sample.id)
        for view in range(1, self.count + 1):
            with seeded_random(derived_seed(self.seed, number, view)):
                yield self.transform.pixels(picture)


class Generated:
    """The test views of the first ``count`` pictures that a bank has of an image (DiffTPT, ``difftpt_utils.py``)."""

    def __init__(self, preprocess: PreprocessLike, bank: ImageBank, count: int) -> None:
        self.preprocess, self.transform, self.bank, self.count = (
            preprocess,
            Transform(preprocess, "center"),
            bank,
            count,
        )

    def shared(self) -> Generated:
        """Return the views to compute and keep: these."""
        return self

    def facts(self) -> dict[str, Any]:
        """Return description, number and the bank's recipe."""
        text = describe_transform(self.preprocess, "center")
        return {"view": text, "views": self.count, "recipe": self.bank.recipe_id}

    def pixels(self, sample: Sample, picture: Image) -> Iterator[Pixels]:
        """Give the views' pixels; raises DataError if the bank does not have so many pictures."""
        for made in self.bank.pictures(sample.source, self.count):
            yield self.transform.pixels(made)


class MultiViewImages(ImageBatches):
    """Batches of all views of an image, ``[b, V, 3, S, S]``: each image is decoded once for all of them.

    Pixels are uint8; if a part has float32 ones (AugMix), the batch is normalised already.

    Args:
        samples: The images.
        parts: Their views, one part behind the other.
        labels: Of all samples.
        positions: The samples that keys count; ``None`` for all.
        skip: Whether unreadable images are left out instead of raised.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        parts: Sequence[Drawn | Generated],
        labels: Tensor,
        positions: Sequence[int] | None = None,
        *,
        skip: bool = False,
    ) -> None:
        super().__init__(PixelCache(samples, parts[0].transform), labels, positions, skip=skip)
        self.parts, self.views = parts, sum(part.count for part in parts)
        self.mixed = any(part.transform.mixed for part in parts)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        samples, size = self.cache.samples, self.cache.transform.size
        kind = torch.float32 if self.mixed else torch.uint8
        images = torch.empty(len(keys), self.views, 3, size, size, dtype=kind)
        read, skipped = list[int](), list[int]()
        for _, index in keys:
            position = int(self.positions[index])
            sample = samples[position]
            try:
                picture = sample.source.open()
            except DataError:
                if not self.skip:
                    raise
                skipped.append(position)
                continue
            pixels = (one for part in self.parts for one in part.pixels(sample, picture))
            for place, one in zip(images.numpy()[len(read)], pixels, strict=True):
                np.copyto(place, one)
            read.append(position)
        shown = images[: len(read)]
        shown = self.cache.transform.finish(shown) if self.mixed else shown
        batch = {"images": shown, **self.batch(torch.tensor(read, dtype=torch.int64))}
        if self.skip:
            batch["skipped"] = torch.tensor(skipped, dtype=torch.int64)
        return batch


def other_views(
    preprocess: PreprocessLike, views: TestViews, bank: ImageBank | None, seed: int
) -> list[Drawn | Generated]:
    """Return the views of a test image beside the test view: crops, then generated pictures.

    Raises:
        ConfigError: Generated pictures without their bank.
    """
    parts: list[Drawn | Generated] = []
    if views.crops:
        parts.append(Drawn(preprocess, "augmix" if views.augmix else "crop", views.crops, seed))
    if views.generated:
        if bank is None:
            raise ConfigError(f"test_views has {views.generated} generated pictures: pass their bank, generated=.")
        parts.append(Generated(preprocess, bank, views.generated))
    return parts
