"""Samples and split lists, as readers return them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlprompt._files import sha256_lines

if TYPE_CHECKING:
    from vlprompt.datasets.images import ImageSource

SPLITS = ("train", "val", "test")
Label = int | tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        id: POSIX path relative to the data set's image folder; identifies the sample in hashes and results.
        label: Class index from 0; in a multi-label data set, a tuple of class indices in ascending order.
        source: Source of the pixels; ``source.open()`` returns a PIL RGB image.
        domain: Domain of the sample, in data sets with domains (:attr:`vlprompt.datasets.Card.domains`).
    """

    id: str
    label: Label
    source: ImageSource
    domain: str = ""


@dataclass(frozen=True)
class SplitLists:
    """A complete data set: class names by label and the three lists in their official order.

    Attributes:
        class_names: Names by label, spelled as on the card (underscores kept).
        train: Training samples; empty in a test-only data set.
        val: Validation samples; may be empty.
        test: Test samples.
        sampler: Name of the few-shot sampler: ``dassl-v1`` for lists in file order, ``sorted-v1`` for lists in the
            order of sorted file names (CoOp's order there depends on the file system and cannot be reproduced).
        sample_val: Whether the sampler also draws validation images (not for ImageNet, whose validation list is its
            test list).
    """

    class_names: list[str]
    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    sampler: str = "dassl-v1"
    sample_val: bool = True

    def content_sha256(self) -> str:
        """Return the SHA-256 of lines ``split<TAB>path<TAB>label<TAB>name`` joined by LF."""
        return sha256_lines(self._line(split, sample) for split in SPLITS for sample in getattr(self, split))

    def _line(self, split: str, sample: Sample) -> str:
        labels = labels_of(sample)
        names = ",".join(self.class_names[label] for label in labels)
        return f"{split}\t{sample.id}\t{','.join(map(str, labels))}\t{names}"


def labels_of(sample: Sample) -> tuple[int, ...]:
    """Return the sample's labels as a tuple, of length 1 unless the data set is multi-label."""
    return sample.label if isinstance(sample.label, tuple) else (sample.label,)


def counted(count: int, noun: str) -> str:
    """Return ``1 image`` or ``7 images``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def shots_in_words(shots: int, per_class: Sequence[int] | None) -> str:
    """Return the training images of a class for headings: ``1 shot``, ``40 shots (12 a class available)``.

    Args:
        shots: The requested number; -1 for all images.
        per_class: The least and the largest number of images of a class; None if not known (older results).
    """
    least, most = (shots, shots) if per_class is None else per_class
    if not most:
        return "no training images"
    if shots == -1:
        return "all images"
    words = counted(shots, "shot")
    if least >= shots:
        return words
    return f"{words} ({least if least == most else f'{least} to {most}'} a class available)"


def class_name_problem(name: object) -> str | None:
    """Return why ``name`` cannot be a class name, or ``None`` if it can (rule S09)."""
    if not isinstance(name, str):
        return f"class name {name!r} is not text"
    if not name.strip():
        return "the class name is empty"
    if len(name) > 200:
        return f"class name {name[:30] + '...'!r} has {len(name)} characters; at most 200 are accepted"
    if not name.isprintable():
        return f"class name {name!r} has unprintable characters"
    if "{" in name or "}" in name:
        return f"class name {name!r} has braces, which break templates"
    return None
