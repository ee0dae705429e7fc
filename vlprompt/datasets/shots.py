"""Few-shot samplers, and the cut into base and new classes.

``dassl-v1`` reproduces the draws of CoOp, CoCoOp, MaPLe, PromptSRC and KgCoOp image for image. Other families draw
other images for the same seed; each has its own sampler. All samplers use private generators, independent of other
random state in the process.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlprompt._random import NumpyRandom
from vlprompt.datasets.records import Sample, labels_of
from vlprompt.errors import ConfigError, did_you_mean

#: Validation images per class drawn with a few-shot training list, at most.
VAL_SHOTS = 4
WHOLE, AT_MOST = "the whole list", f"at most {VAL_SHOTS} a class"
Samples = list[Sample]


def check_draw(shots: int, seed: int) -> None:
    """Raise :class:`~vlprompt.errors.ConfigError` unless ``shots`` is >= 1 or -1 and ``seed`` is an int >= 0."""
    if isinstance(shots, bool) or not isinstance(shots, int) or (shots < 1 and shots != -1):
        raise ConfigError(
            f"data.shots is {shots!r}; accepted: 1 or more images per class, or -1 for the complete training list. "
            "Zero-shot runs need no training: --method zeroshot"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; accepted: a whole number from 0 (0 is a seed like any other).")


def fewshot(
    train: Sequence[Sample],
    val: Sequence[Sample],
    shots: int,
    seed: int,
    *,
    sampler: str = "dassl-v1",
    sample_val: bool = True,
) -> tuple[Samples, Samples]:
    """Draw ``shots`` training images per class, and the validation images that ``sampler`` defines.

    Args:
        train: Training samples in file order.
        val: Validation samples in file order.
        shots: Images per class (>= 1), or -1 for both complete lists.
        seed: Seed of the private generator (>= 0).
        sampler: A name in :data:`SAMPLERS`.
        sample_val: ``False`` keeps the complete validation list (ImageNet).

    Returns:
        The training and validation lists in sampler order.

    Raises:
        ConfigError: If ``shots`` or ``seed`` is out of range, the sampler is unknown, or it cannot draw from these
            lists.
    """
    check_draw(shots, seed)
    chosen = find_sampler(sampler)
    if shots == -1 or not train:
        return list(train), list(val)
    if chosen.one_label and any(isinstance(sample.label, tuple) for sample in train):
        raise ConfigError(
            f"data.sampler is {sampler!r}, which draws by class; images with several labels need elevater-v1."
        )
    return chosen.draw(train, val if sample_val else None, shots, seed, list(val))


def validation_rule(sampler: str, shots: int, *, sample_val: bool = True) -> str:
    """Return which validation images :func:`fewshot` returns with these arguments, in words."""
    chosen = find_sampler(sampler)
    return WHOLE if shots == -1 or not (sample_val or chosen.from_train) else chosen.val


# -- samplers ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sampler:
    """A few-shot sampler.

    Attributes:
        about: One line of description.
        draw: Function of the training list, the validation list (``None`` if it is not sampled), shots, seed and the
            complete validation list; returns the training and validation samples.
        val: The validation images that it draws, in words.
        from_train: Whether it draws training images for validation where the validation list is not sampled.
        one_label: Whether every image must have exactly one label.
    """

    about: str
    draw: Callable[[Sequence[Sample], Sequence[Sample] | None, int, int, Samples], tuple[Samples, Samples]]
    val: str = AT_MOST
    from_train: bool = False
    one_label: bool = True


def _dassl(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    # Classes are taken in the order of their first sample. A class with fewer images contributes all of them, in file
    # order, and consumes no random numbers. The validation draw continues the random stream of the training draw.
    generator = random.Random(seed)
    chosen = _draw(train, shots, generator)
    return chosen, whole if val is None else _draw(val, min(shots, VAL_SHOTS), generator)


def _clip_lora(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    generator, val_shots = random.Random(seed), min(shots, VAL_SHOTS)
    if val is None:
        return _two_of_one(train, shots, val_shots, generator, "clip-lora-v1")
    chosen = _draw(val, val_shots, generator, fill=True)
    return _draw(train, shots, generator, fill=True), chosen


def _lp_plus_plus(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    generator = random.Random(seed)
    if val is None:
        return _two_of_one(train, shots, shots, generator, "lp-plus-plus-v1")
    return _draw(train, shots, generator, fill=True), _draw(val, shots, generator, fill=True)


def _two_of_one(
    train: Sequence[Sample], shots: int, val_shots: int, generator: random.Random, name: str
) -> tuple[Samples, Samples]:
    """Draw training and validation images from the training list: ImageNet's validation images are its test images."""
    train_drawn, val_drawn = [], []
    for members in _by_label_in_order(train):
        if len(members) < shots + val_shots:
            raise ConfigError(f"data.shots is {shots}; {name} needs {shots + val_shots} training images in every class")
        drawn = generator.sample(members, shots + val_shots)
        train_drawn += drawn[:shots]
        val_drawn += drawn[shots:]
    return train_drawn, val_drawn


def _lpclip(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    # The official code stops at a class with too few images; here such a class gives all of them. On ImageNet it draws
    # validation images from the test images.
    generator = NumpyRandom(seed)

    def draw(samples: Sequence[Sample], count: int) -> Samples:
        return [
            members[place]
            for members in _by_label_in_order(samples)
            for place in generator.permutation(len(members))[:count]
        ]

    chosen = draw(train, shots)
    return chosen, whole if val is None else draw(val, min(shots, VAL_SHOTS))


def _tip(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    return _draw(train, shots, random.Random(seed), fill=True), whole


def _tpt(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    chosen: Samples = []
    for members in _by_label_in_order(train):
        if len(members) < shots:
            raise ConfigError(f"data.shots is {shots}; tpt-v1 needs as many training images in every class.")
        chosen += random.Random(0).sample(members, shots)
    return chosen, whole


def _elevater(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    # Greedy over a shuffled list: an image with several labels counts for each of its classes. Validation samples are
    # cut from the drawn samples; the data set's validation list is not used.
    order = list(train)
    random.Random(seed).shuffle(order)
    count = dict.fromkeys((label for sample in train for label in labels_of(sample)), 0)
    negatives = 0
    chosen: Samples = []
    for sample in order:
        labels = labels_of(sample)
        if not labels:
            chosen += [sample] if negatives < shots else []
            negatives += 1
            continue
        least, most = min(count[label] for label in labels), max(count[label] for label in labels)
        if least < shots and (least <= shots / 2 or most <= 1.5 * shots):
            chosen.append(sample)
            for label in labels:
                count[label] += 1
        if min(count.values()) >= shots:
            break
    return _cut_a_fifth(chosen)


def _cut_a_fifth(chosen: Samples) -> tuple[Samples, Samples]:
    """Move the first fifth of each class, rounded up, to validation; with one shot, both lists are the same."""
    wanted: dict[int, int] = {}
    for sample in chosen:
        for label in labels_of(sample):
            wanted[label] = wanted.get(label, 0) + 1
    if all(count == 1 for count in wanted.values()):
        return chosen, list(chosen)
    wanted = {label: math.ceil(0.2 * count) for label, count in sorted(wanted.items())}
    validation: set[int] = set()
    while needy := [label for label, count in wanted.items() if count > 0]:
        index = next((i for i, s in enumerate(chosen) if i not in validation and needy[0] in labels_of(s)), None)
        if index is None:
            break
        validation.add(index)
        for label in labels_of(chosen[index]):
            wanted[label] -= 1
    return [s for i, s in enumerate(chosen) if i not in validation], [chosen[i] for i in sorted(validation)]


SAMPLERS: dict[str, Sampler] = {
    "dassl-v1": Sampler("CoOp and its family: training first, then validation, short classes complete", _dassl),
    "sorted-v1": Sampler("dassl-v1 on lists sorted by name, where CoOp's order depends on the file system", _dassl),
    "clip-lora-v1": Sampler(
        "CLIP-LoRA: validation first, short classes filled with replacement", _clip_lora, from_train=True
    ),
    "tip-v1": Sampler("Tip-Adapter, whose seed is 1: short classes filled, validation complete", _tip, WHOLE),
    "tpt-v1": Sampler("TPT: a generator of seed 0 per class, whatever the seed, validation complete", _tpt, WHOLE),
    "lp-plus-plus-v1": Sampler(
        "LP++, whose seeds are 1 to 10: as many validation images as shots, short classes filled",
        _lp_plus_plus,
        "as many a class as there are shots",
        from_train=True,
    ),
    "lpclip-v1": Sampler("CoOp's linear probe: NumPy's generator, classes in order, training first", _lpclip),
    "elevater-v1": Sampler(
        "ELEVATER: greedy over a shuffled list, a fifth of it for validation",
        _elevater,
        "a fifth of the drawn images",
        from_train=True,
        one_label=False,
    ),
}


def find_sampler(name: str) -> Sampler:
    """Return the sampler called ``name``; raises :class:`~vlprompt.errors.ConfigError` with the nearest names."""
    if name not in SAMPLERS:
        raise ConfigError(f"data.sampler is {name!r}.{did_you_mean(str(name), SAMPLERS)}")
    return SAMPLERS[name]


def _by_label(samples: Sequence[Sample]) -> list[Samples]:
    """Return the samples grouped by label, labels in order of first occurrence."""
    by_label: dict[object, Samples] = {}
    for sample in samples:
        by_label.setdefault(sample.label, []).append(sample)
    return list(by_label.values())


def _by_label_in_order(samples: Sequence[Sample]) -> list[Samples]:
    """Return the samples grouped by label, labels in ascending order."""
    return sorted(_by_label(samples), key=lambda members: labels_of(members[0]))


def _draw(samples: Sequence[Sample], shots: int, generator: random.Random, *, fill: bool = False) -> Samples:
    """Draw from each class. A class with too few images gives all of them, or samples with replacement if ``fill``."""
    chosen: Samples = []
    for members in _by_label(samples):
        if len(members) >= shots:
            chosen += generator.sample(members, shots)
        else:
            chosen += generator.choices(members, k=shots) if fill else members
    return chosen


# -- base and new -----------------------------------------------------------------------------------------------------
def class_labels(labels: Sequence[int], classes: str) -> list[int]:
    """Return the labels that belong to ``classes``: ``all``, ``base`` (the first half, rounded up) or ``new``.

    Args:
        labels: The labels of the few-shot training list, in any order, repeated or not.
        classes: ``all``, ``base`` or ``new``.

    Raises:
        ConfigError: If ``classes`` has another value, or there are too few labels for a ``new`` half.
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


def keep_labels(samples: Sequence[Sample], labels: Sequence[int]) -> Samples:
    """Return the samples with a label in ``labels``, renumbered by its position in ``labels``; keeps the order.

    Other labels of a multi-label image are dropped. An image without any remaining label is dropped.
    """
    position = {label: index for index, label in enumerate(labels)}
    kept = []
    for sample in samples:
        renumbered = tuple(position[label] for label in labels_of(sample) if label in position)
        if renumbered:
            label = renumbered if isinstance(sample.label, tuple) else renumbered[0]
            kept.append(dataclasses.replace(sample, label=label))
    return kept
