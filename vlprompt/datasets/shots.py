"""Which images a few-shot run trains on, and which classes are base and new.

``dassl-v1`` reproduces, image for image, what CoOp, CoCoOp, MaPLe, PromptSRC and KgCoOp draw (datasets.md sections 2.1
and 2.5). Families that draw others with the same seed have samplers of their own (2.4). All use private generators
that nothing else in the process can disturb.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlprompt.datasets.records import Sample, labels_of
from vlprompt.errors import ConfigError, did_you_mean

#: At most this many validation images a class go with a few-shot training list.
VAL_SHOTS = 4
Samples = list[Sample]


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
    train: Sequence[Sample],
    val: Sequence[Sample],
    shots: int,
    seed: int,
    *,
    sampler: str = "dassl-v1",
    sample_val: bool = True,
) -> tuple[Samples, Samples]:
    """Draw ``shots`` training images per class, and validation images as ``sampler`` has it.

    Args:
        train: Training samples in file order.
        val: Validation samples in file order.
        shots: Images per class (>= 1), or -1 for both lists as they are.
        seed: Seed of the private generator (>= 0).
        sampler: A name of :data:`SAMPLERS`.
        sample_val: ``False`` leaves the validation list as it is (ImageNet).

    Returns:
        The training and validation lists in sampler order.

    Raises:
        ConfigError: If ``shots`` or ``seed`` is out of range, the sampler is unknown, or it cannot draw from these.
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


# -- samplers ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sampler:
    """A rule of drawing: in a line what it does, the rule itself, and whether it needs one label an image.

    The rule takes the training list, the validation list (``None`` where it is not to be drawn from), shots, seed, and
    the whole validation list.
    """

    about: str
    draw: Callable[[Sequence[Sample], Sequence[Sample] | None, int, int, Samples], tuple[Samples, Samples]]
    one_label: bool = True


def _dassl(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    # Classes in the order in which the list first shows them; a class with fewer images gives all of them, in file
    # order, and draws no random numbers. Validation goes on with the training draw's stream.
    generator = random.Random(seed)
    chosen = _draw(train, shots, generator)
    return chosen, whole if val is None else _draw(val, min(shots, VAL_SHOTS), generator)


def _clip_lora(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    generator, more = random.Random(seed), min(shots, VAL_SHOTS)
    if val is not None:
        chosen = _draw(val, more, generator, fill=True)
        return _draw(train, shots, generator, fill=True), chosen
    # ImageNet, whose validation images are the test's: both parts are one draw from the training images.
    learnt, judged = [], []
    for members in sorted(_by_label(train), key=lambda members: labels_of(members[0])):
        if len(members) < shots + more:
            raise ConfigError(
                f"data.shots is {shots}; clip-lora-v1 needs {shots + more} training images in every class."
            )
        drawn = generator.sample(members, shots + more)
        learnt += drawn[:shots]
        judged += drawn[shots:]
    return learnt, judged


def _tip(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    return _draw(train, shots, random.Random(seed), fill=True), whole


def _tpt(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    chosen: Samples = []
    for members in sorted(_by_label(train), key=lambda members: labels_of(members[0])):
        if len(members) < shots:
            raise ConfigError(f"data.shots is {shots}; tpt-v1 needs as many training images in every class.")
        chosen += random.Random(0).sample(members, shots)
    return chosen, whole


def _elevater(
    train: Sequence[Sample], val: Sequence[Sample] | None, shots: int, seed: int, whole: Samples
) -> tuple[Samples, Samples]:
    # Greedy over a shuffled list, so that images with several labels count for each of their classes. The validation
    # list is cut from the draw itself; the data set's own is not used.
    order = list(train)
    random.Random(seed).shuffle(order)
    count = dict.fromkeys((label for sample in train for label in labels_of(sample)), 0)
    negatives = 0
    chosen: Samples = []
    for sample in order:
        own = labels_of(sample)
        if not own:
            chosen += [sample] if negatives < shots else []
            negatives += 1
            continue
        least, most = min(count[label] for label in own), max(count[label] for label in own)
        if least < shots and (least <= shots / 2 or most <= 1.5 * shots):
            chosen.append(sample)
            for label in own:
                count[label] += 1
        if min(count.values()) >= shots:
            break
    return _cut_a_fifth(chosen)


def _cut_a_fifth(chosen: Samples) -> tuple[Samples, Samples]:
    """Cut the first images of each class, a fifth rounded up, off for validation; one shot does for both."""
    wanted: dict[int, int] = {}
    for sample in chosen:
        for label in labels_of(sample):
            wanted[label] = wanted.get(label, 0) + 1
    if all(count == 1 for count in wanted.values()):
        return chosen, list(chosen)
    wanted = {label: math.ceil(0.2 * count) for label, count in sorted(wanted.items())}
    judged: set[int] = set()
    while needy := [label for label, count in wanted.items() if count > 0]:
        index = next((i for i, s in enumerate(chosen) if i not in judged and needy[0] in labels_of(s)), None)
        if index is None:
            break
        judged.add(index)
        for label in labels_of(chosen[index]):
            wanted[label] -= 1
    return [s for i, s in enumerate(chosen) if i not in judged], [chosen[i] for i in sorted(judged)]


SAMPLERS: dict[str, Sampler] = {
    "dassl-v1": Sampler("CoOp and its family: training first, then validation, short classes whole", _dassl),
    "sorted-v1": Sampler("dassl-v1 on lists sorted by name, where CoOp's order depends on the file system", _dassl),
    "clip-lora-v1": Sampler("CLIP-LoRA: validation first, short classes filled with replacement", _clip_lora),
    "tip-v1": Sampler("Tip-Adapter, whose seed is 1: short classes filled, validation complete", _tip),
    "tpt-v1": Sampler("TPT: seed 0 for every class anew, whatever the seed, validation complete", _tpt),
    "elevater-v1": Sampler("ELEVATER: greedy over a shuffled list, a fifth of the draw validates", _elevater, False),
}


def find_sampler(name: str) -> Sampler:
    """Return the sampler called ``name``; raises :class:`~vlprompt.errors.ConfigError` with the nearest names."""
    if name not in SAMPLERS:
        raise ConfigError(f"data.sampler is {name!r}.{did_you_mean(str(name), SAMPLERS)}")
    return SAMPLERS[name]


def _by_label(samples: Sequence[Sample]) -> list[Samples]:
    """Return the samples of each label, labels in the order in which they first occur."""
    by_label: dict[object, Samples] = {}
    for sample in samples:
        by_label.setdefault(sample.label, []).append(sample)
    return list(by_label.values())


def _draw(samples: Sequence[Sample], shots: int, generator: random.Random, *, fill: bool = False) -> Samples:
    """Draw from each class; one with fewer images gives all, or with ``fill`` is drawn from with replacement."""
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


def keep_labels(samples: Sequence[Sample], labels: Sequence[int]) -> Samples:
    """Return the samples with a label among ``labels``, re-numbered by position in ``labels``, order kept.

    Of several labels those that are not among ``labels`` are dropped; an image left without any is dropped too.
    """
    position = {label: index for index, label in enumerate(labels)}
    kept = []
    for sample in samples:
        own = tuple(position[label] for label in labels_of(sample) if label in position)
        if own:
            kept.append(dataclasses.replace(sample, label=own if isinstance(sample.label, tuple) else own[0]))
    return kept
