"""Filling of a bank: generates missing and damaged images in batches and stores each batch at once."""

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

#: Attempts per image before an image that the safety checker always flags is an error.
ATTEMPTS = 10


class Generator(Protocol):
    """Interface of :class:`~vlprompt.generation.pipeline.PipelineGenerator`."""

    def generate(self, images: Sequence[Image], seeds: Sequence[int]) -> list[Image | None]:
        """Return a generated image per source image and seed; None for an image that the safety checker flags."""


@dataclass
class Progress:
    """Progress of filling a bank.

    Attributes:
        stage: ``checking`` existing images, counted by source image, or ``making`` new ones, counted by image.
        done: Number done.
        total: Total number.
        left: Estimated seconds until the stage is done; None before the first measurement.
    """

    stage: str
    done: int
    total: int
    left: float | None = None


@dataclass
class Filled:
    """Result of filling a bank.

    Attributes:
        images: Number of source images with different content.
        found: Number of generated images that existed.
        made: Number of images generated now.
        remade: Number of these that replace damaged or missing images.
        skipped: Ids of source images that could not be read.
    """

    images: int = 0
    found: int = 0
    made: int = 0
    remade: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Wanted:
    source: str  # SHA-256 of the source image
    sample: Sample
    number: int


def fill(
    bank: DiffusionBank,
    generator: Generator,
    samples: Sequence[Sample],
    count: int,
    batch_size: int,
    report: Callable[[Progress], None] = lambda progress: None,
    *,
    skip: bool = False,
) -> Filled:
    """Generate those of the first ``count`` images of every source image that the bank lacks.

    A batch may span several source images. A killed process loses its current batch.

    Args:
        bank: The bank, with the recipe of ``generator``.
        generator: Generates the images.
        samples: The source images; those with the same content share generated images.
        count: Generated images per source image.
        batch_size: Images generated at once.
        report: Called with the progress.
        skip: Whether to skip source images that cannot be read instead of raising.

    Raises:
        DataError: If a source image cannot be read, the bank cannot be written, or the safety checker flags every
            attempt of an image.
    """
    filled = Filled()
    wanted = list(_wanted(bank, samples, count, report, skip, filled))
    start = time.monotonic()
    report(Progress("making", 0, len(wanted)))
    opened: dict[str, Image] = {}
    while filled.made < len(wanted):
        batch = wanted[filled.made : filled.made + batch_size]
        opened = {digest: image for digest, image in opened.items() if digest == batch[0].source}
        for entry in batch:
            if entry.source not in opened:
                opened[entry.source] = entry.sample.source.open()
        generated = _generated(bank, generator, batch, opened)
        for source in dict.fromkeys(entry.source for entry in batch):
            images = {
                entry.number: image for entry, image in zip(batch, generated, strict=True) if entry.source == source
            }
            bank.store(source, next(entry.sample.id for entry in batch if entry.source == source), images)
        filled.made += len(batch)
        each = (time.monotonic() - start) / filled.made
        report(Progress("making", filled.made, len(wanted), each * (len(wanted) - filled.made)))
    return filled


def _wanted(
    bank: DiffusionBank,
    samples: Sequence[Sample],
    count: int,
    report: Callable[[Progress], None],
    skip: bool,
    filled: Filled,
) -> Iterator[_Wanted]:
    """Yield every image to generate, by source image; count existing images in ``filled``."""
    seen: set[str] = set()
    start = time.monotonic()
    for position, sample in enumerate(samples, 1):
        try:
            source = content_sha256(sample.source)
            missing, lost = ([], []) if source in seen else bank.missing(source, count)
            if missing:
                sample.source.open()  # raises for an undecodable image before any image is generated
        except DataError:
            if not skip:
                raise
            filled.skipped.append(sample.id)
            continue
        if source not in seen:
            filled.images += 1
            filled.found += count - len(missing)
            filled.remade += len(lost)
            yield from (_Wanted(source, sample, number) for number in missing)
        seen.add(source)
        left = (time.monotonic() - start) / position * (len(samples) - position)
        report(Progress("checking", position, len(samples), left))


def _generated(
    bank: DiffusionBank, generator: Generator, batch: Sequence[_Wanted], opened: dict[str, Image]
) -> list[Image]:
    accepted: dict[int, Image] = {}
    for attempt in range(ATTEMPTS):
        pending = [index for index in range(len(batch)) if index not in accepted]
        images = generator.generate(
            [opened[batch[index].source] for index in pending],
            [bank.recipe.seed_of(batch[index].source, batch[index].number, attempt) for index in pending],
        )
        accepted |= {index: image for index, image in zip(pending, images, strict=True) if image is not None}
        if len(accepted) == len(batch):
            return [accepted[index] for index in range(len(batch))]
    flagged = next(entry for index, entry in enumerate(batch) if index not in accepted)
    raise DataError(
        f"The safety checker flags every generated image of {flagged.sample.id} ({ATTEMPTS} attempts). Remove the "
        "image or disable the checker: --safety-checker off"
    )
