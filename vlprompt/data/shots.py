"""Which images a few-shot run trains on, and which classes are base and new.

Reproduces, image for image, what CoOp, CoCoOp, MaPLe, PromptSRC and KgCoOp draw (datasets.md sections 2.1 and 2.5),
with a private generator that nothing else in the process can disturb.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from vlprompt.data.records import Sample
from vlprompt.errors import ConfigError

#: At most this many validation images a class go with a few-shot training list.
VAL_SHOTS = 4


def check_draw(shots: int, seed: int) -> None:
    """Raise :class:`~vlprompt.errors.ConfigError` unless ``shots`` is >= 1 or -1 and ``seed`` is an int >= 0."""
    if isinstance(shots, bool) or not isinstance(shots, int) or (shots < 1 and shots != -1):
        raise ConfigError(
            f"data.shots is {shots!r}; accepted: 1 or more images per class, or -1 for the complete training list. "
            "For zero-shot use no training at all: --method zeroshot"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; accepted: a whole number from 0 (0 is a seed like any other).")


def fewshot(
    train: Sequence[Sample], val: Sequence[Sample], shots: int, seed: int, *, sample_val: bool = True
) -> tuple[list[Sample], list[Sample]]:
    """Draw ``shots`` training images per class and ``min(shots, 4)`` validation images per class.

    Classes are visited in the order in which the training list first shows them. A class with fewer images gives all
    of them, in file order, and draws no random numbers. Validation continues the training draw's random stream.

    Args:
        train: Training samples in file order.
        val: Validation samples in file order.
        shots: Images per class (>= 1), or -1 for both lists as they are.
        seed: Seed of the private generator (>= 0).
        sample_val: ``False`` leaves the validation list as it is (ImageNet).

    Returns:
        The training and validation lists in sampler order, grouped by class.

    Raises:
        ConfigError: If ``shots`` or ``seed`` is out of range.
    """
    check_draw(shots, seed)
    if shots == -1:
        return list(train), list(val)
    generator = random.Random(seed)
    chosen = _draw(train, shots, generator)
    return chosen, _draw(val, min(shots, VAL_SHOTS), generator) if sample_val else list(val)


def _draw(samples: Sequence[Sample], shots: int, generator: random.Random) -> list[Sample]:
    by_label: dict[int, list[Sample]] = {}
    for sample in samples:
        by_label.setdefault(sample.label, []).append(sample)
    chosen: list[Sample] = []
    for members in by_label.values():
        chosen += generator.sample(members, shots) if len(members) >= shots else members
    return chosen


def class_labels(labels: Sequence[int], classes: str) -> list[int]:
    """Return the labels that belong to ``classes``: ``all``, ``base`` (the first half, rounded up) or ``new``.

    Args:
        labels: The labels of the few-shot training list, in any order, repeated or not.
        classes: ``all``, ``base`` or ``new``.

    Raises:
        ConfigError: If ``classes`` is another word, or if there are too few labels for a ``new`` half.
    """
    if classes not in ("all", "base", "new"):
        raise ConfigError(f"data.classes is {classes!r}; accepted: all, base, new.")
    present = sorted(set(labels))
    if classes == "all":
        return present
    half = (len(present) + 1) // 2
    if classes == "new" and half == len(present):
        raise ConfigError(f"data.classes is 'new', but {len(present)} class cannot be cut into base and new classes.")
    return present[:half] if classes == "base" else present[half:]


def keep_labels(samples: Sequence[Sample], labels: Sequence[int]) -> list[Sample]:
    """Return the samples whose label is among ``labels``, re-numbered by position in ``labels``, order kept."""
    position = {label: index for index, label in enumerate(labels)}
    kept = [sample for sample in samples if sample.label in position]
    return [dataclasses.replace(sample, label=position[sample.label]) for sample in kept]
