"""Fills a bank: finds what is missing or damaged, makes it in batches, keeps every batch as soon as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vlprompt.datasets.records import Sample
from vlprompt.errors import DataError
from vlprompt.generation.bank import DiffusionBank, content_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

#: Draws of a picture that the safety checker flags every time, before the image is given up.
ATTEMPTS = 10


class Maker(Protocol):
    """What makes pictures: :class:`~vlprompt.generation.pipeline.PictureMaker`."""

    def make(self, images: Sequence[Image], seeds: Sequence[int]) -> list[Image | None]:
        """Return a picture of each image, drawn by its seed; None where it must not be used."""


@dataclass
class Progress:
    """How far a bank is.

    Attributes:
        stage: ``checking`` the pictures that are there, by images, or ``making`` others, by pictures.
        done: Images or pictures so far.
        total: Of how many.
        left: Seconds until the stage is done, as far as can be told; None before anything was measured.
    """

    stage: str
    done: int
    total: int
    left: float | None = None


@dataclass
class Filled:
    """What was done.

    Attributes:
        images: Images of different content that have all of their pictures now.
        found: Pictures that were there.
        made: Pictures that were made.
        remade: Those of them that had been there, and were damaged or gone.
        skipped: Ids of images that could not be read.
    """

    images: int = 0
    found: int = 0
    made: int = 0
    remade: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Wanted:
    image: str
    sample: Sample
    number: int


def fill(
    bank: DiffusionBank,
    maker: Maker,
    samples: Sequence[Sample],
    count: int,
    batch_size: int,
    tell: Callable[[Progress], None] = lambda progress: None,
    *,
    skip: bool = False,
) -> Filled:
    """Make the first ``count`` pictures of every image, as far as the bank does not have them.

    A batch goes on from one image to the next. Killed, it loses the batch it was at.

    Args:
        bank: Where pictures are kept; of ``maker``'s recipe.
        maker: What makes them.
        samples: The images; those of the same content share their pictures.
        count: Pictures of each.
        batch_size: Pictures that are made at once.
        tell: Is told how far it is.
        skip: Whether images that cannot be read are left out instead of raised.

    Raises:
        DataError: An image that cannot be read, a bank that cannot be written, or an image whose pictures the safety
            checker flags again and again.
    """
    filled = Filled()
    wanted = list(_wanted(bank, samples, count, tell, skip, filled))
    start = time.monotonic()
    tell(Progress("making", 0, len(wanted)))
    opened: dict[str, Image] = {}
    while filled.made < len(wanted):
        batch = wanted[filled.made : filled.made + batch_size]
        opened = {image: picture for image, picture in opened.items() if image == batch[0].image}
        for one in batch:
            if one.image not in opened:
                opened[one.image] = one.sample.source.open()
        pictures = _drawn(bank, maker, batch, opened)
        for image in dict.fromkeys(one.image for one in batch):
            own = {one.number: picture for one, picture in zip(batch, pictures, strict=True) if one.image == image}
            bank.keep(image, next(one.sample.id for one in batch if one.image == image), own)
        filled.made += len(batch)
        each = (time.monotonic() - start) / filled.made
        tell(Progress("making", filled.made, len(wanted), each * (len(wanted) - filled.made)))
    return filled


def _wanted(
    bank: DiffusionBank,
    samples: Sequence[Sample],
    count: int,
    tell: Callable[[Progress], None],
    skip: bool,
    filled: Filled,
) -> Iterator[_Wanted]:
    """Give every picture to make, image by image; note in ``filled`` what is there."""
    seen: set[str] = set()
    start = time.monotonic()
    for position, sample in enumerate(samples, 1):
        try:
            image = content_sha256(sample.source)
            lacking, gone = ([], []) if image in seen else bank.missing(image, count)
            if lacking:
                sample.source.open()  # what cannot be decoded is found before the first picture is made
        except DataError:
            if not skip:
                raise
            filled.skipped.append(sample.id)
            continue
        if image not in seen:
            filled.images += 1
            filled.found += count - len(lacking)
            filled.remade += len(gone)
            yield from (_Wanted(image, sample, number) for number in lacking)
        seen.add(image)
        left = (time.monotonic() - start) / position * (len(samples) - position)
        tell(Progress("checking", position, len(samples), left))


def _drawn(bank: DiffusionBank, maker: Maker, batch: Sequence[_Wanted], opened: dict[str, Image]) -> list[Image]:
    found: dict[int, Image] = {}
    for attempt in range(ATTEMPTS):
        places = [place for place in range(len(batch)) if place not in found]
        made = maker.make(
            [opened[batch[place].image] for place in places],
            [bank.recipe.seed_of(batch[place].image, batch[place].number, attempt) for place in places],
        )
        found |= {place: picture for place, picture in zip(places, made, strict=True) if picture is not None}
        if len(found) == len(batch):
            return [found[place] for place in range(len(batch))]
    bad = next(one for place, one in enumerate(batch) if place not in found)
    raise DataError(
        f"The safety checker flags every picture of {bad.sample.id} ({ATTEMPTS} draws). Leave the image out, or do "
        "without the checker: --safety-checker off"
    )
