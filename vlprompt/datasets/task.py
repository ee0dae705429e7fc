"""Few-shot tasks: the samples, class names and hashes of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from vlprompt._files import sha256_json, sha256_lines, sha256_text
from vlprompt.config.texts import DataTexts
from vlprompt.datasets.card import Card, Metric, describe
from vlprompt.datasets.catalogue import find_card
from vlprompt.datasets.domains import domains_of, keep_domains
from vlprompt.datasets.images import PLAIN, Reading, read_as, reading_of
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.records import SPLITS, Sample, SplitLists, labels_of
from vlprompt.datasets.shot_lists import read_shot_list, use_shot_list
from vlprompt.datasets.shots import (
    WHOLE,
    check_draw,
    class_labels,
    fewshot,
    find_sampler,
    keep_labels,
    validation_rule,
)
from vlprompt.errors import ClassNameError, ConfigError


@dataclass(frozen=True)
class FewShotTask:
    """A few-shot task, as returned by :func:`load_dataset`.

    Attributes:
        name: Name of the data set.
        class_names: Names of the task's classes, by label.
        all_class_names: Names of all classes of the data set, by its labels (base classes come first).
        template: Prompt with ``{}`` for the class name.
        train: Few-shot training samples, labels from 0 within ``class_names``.
        val: Validation samples, as ``validation`` describes them; may be empty.
        test: All test samples of the task's classes, of the ``target`` domains.
        shots: Training images per class, or -1 for all.
        seed: Seed of the draw.
        classes: ``all``, ``base`` or ``new``.
        split_sha256: Content hash of the complete split, before any draw.
        shots_sha256: SHA-256 of the ids in ``train``, joined by LF.
        card: The data set's card.
        sampler: Name of the sampler (:data:`vlprompt.datasets.shots.SAMPLERS`), or that of a few-shot list.
        root: The data root passed to :func:`load_dataset`.
        source: Domains that ``train`` and ``val`` were drawn from; empty for all.
        target: Domains of ``test``; empty for all.
        request: Arguments of :func:`load_dataset` besides the name.
        whole: The task over all classes, from the same draw; None for that task itself.
        validation: Which samples of the validation list ``val`` holds, in words.
        lists: The complete data set, before any draw.
        reading: How orientation tags and transparency are read.
    """

    name: str
    class_names: list[str]
    all_class_names: list[str]
    template: str
    train: list[Sample] = field(repr=False)
    val: list[Sample] = field(repr=False)
    test: list[Sample] = field(repr=False)
    shots: int
    seed: int
    classes: Literal["all", "base", "new"]
    split_sha256: str
    shots_sha256: str
    card: Card = field(repr=False)
    sampler: str = "dassl-v1"
    root: str | None = None
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    whole: FewShotTask | None = field(default=None, repr=False, compare=False)
    validation: str = WHOLE
    lists: SplitLists | None = field(default=None, repr=False, compare=False)
    reading: Reading = PLAIN

    @property
    def texts(self) -> DataTexts:
        """The task's template, and the further templates of the data set."""
        return self.card.texts(self.template)

    @property
    def metric(self) -> Metric:
        """The data set's headline metric."""
        return self.card.metric

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels; labels are then tuples."""
        return self.card.multilabel

    def half(self, classes: Literal["base", "new"]) -> FewShotTask:
        """Return the task of one half of this task's classes, ``base`` or ``new``, with labels from 0.

        Raises:
            ConfigError: If there are too few classes, or the half has no images of the ``target`` domains.
        """
        # A test-only data set has no training list: the classes come from the test list.
        labels = class_labels([label for sample in self.train or self.test for label in labels_of(sample)], classes)
        train, val, test = (keep_labels(samples, labels) for samples in (self.train, self.val, self.test))
        if self.target and not test:
            raise ConfigError(f"data.target is {list(self.target)}, which has no test images of the {classes} classes.")
        return replace(
            self,
            class_names=[self.class_names[label] for label in labels],
            train=train,
            val=val,
            test=test,
            classes=classes,
            shots_sha256=sha256_lines(sample.id for sample in train),
            request={**self.request, "classes": classes},
            whole=self,
        )

    def counterpart(self) -> FewShotTask:
        """Return the task of the other half of the classes, from the same draw: ``new`` for ``base`` and vice versa.

        Raises:
            ConfigError: If this task has all classes.
        """
        if self.whole is None:
            raise ConfigError("A task over all classes has no other half; load it with data.classes base or new.")
        return self.whole.half("new" if self.classes == "base" else "base")

    def by_domain(self) -> dict[str, FewShotTask]:
        """Return by test domain this task with the test samples of that domain only.

        The result is empty for a data set without domains.
        """
        names = domains_of(self.card, self.test) if self.card.domains else []
        return {name: replace(self, test=[sample for sample in self.test if sample.domain == name]) for name in names}

    def shots_per_class(self) -> list[int]:
        """Return the least and the largest number of training images of a class; a class may have too few."""
        count = Counter(label for sample in self.train for label in labels_of(sample))
        counts = [count[label] for label in range(len(self.class_names))]
        return [min(counts, default=0), max(counts, default=0)]

    def describe(self) -> dict[str, Any]:
        """Return the data record of a results file, as plain JSON values."""
        facts = self.card.facts
        published = None if facts.content_sha256 is None else facts.content_sha256 == self.split_sha256
        if self.card.split.endswith(".json"):
            published = False  # a split file of the user
        domains = {"source": list(self.source), "target": list(self.target)} if self.card.domains else {}
        place = self.card.own_place(self.root)
        return {
            "name": self.name,
            "card_sha256": sha256_json(describe(self.card)),
            "reader": self.card.reader,
            "split": self.card.split,
            "metric": self.metric,
            "pixels": asdict(self.reading),
            "classes": self.classes,
            "class_count": len(self.class_names),
            "class_names_sha256": sha256_lines(self.class_names),
            "template": self.template,
            "shots": self.shots,
            "shots_per_class": self.shots_per_class(),
            "seed": self.seed,
            "sampler": self.sampler,
            "validation": self.validation if self.val else "none",
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "split_sha256": self.split_sha256,
            "split_published": published,
            "shots_sha256": self.shots_sha256,
            "val_sha256": sha256_lines(sample.id for sample in self.val),
            **({"place_sha256": sha256_text(place)} if place else {}),
            **domains,
        }


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    shots: int = 16,
    seed: int = 1,
    classes: str = "all",
    template: str | None = None,
    source: Sequence[str] = (),
    target: Sequence[str] = (),
    split: str | None = None,
    sampler: str | None = None,
    shots_file: str | Path | None = None,
    orientation: Literal["tag", "ignore"] | None = None,
    background: str | None = None,
) -> FewShotTask:
    """Read a data set and draw its few-shot task.

    The draw covers all classes and is filtered afterwards, so that base and new tasks of one seed share a draw, as in
    CoOp. Domains are selected before the draw: ``shots`` images per class come from all of ``source``.

    Args:
        name: Name or alias of a data set (:func:`~vlprompt.datasets.list_datasets`); ``folder`` for your own images.
        root: Folder of the data sets; for ``folder``, the folder of images. ``None`` uses the environment variable
            ``VLPROMPT_DATA``, else ``data``. The packaged demo needs none.
        shots: Training images per class, or -1 for the complete lists.
        seed: Seed of the draw, 0 or more.
        classes: ``all``, or the ``base`` or ``new`` half of the classes, with labels from 0.
        template: Prompt that replaces the card's; contains ``{}`` once.
        source: Domains to train on, if the data set has domains; empty for all.
        target: Domains to test on, if the data set has domains; empty for all.
        split: A split of the card, or a split file of your own in the data set's folder; for ``folder`` also the folder
            of a run on it, whose split is kept and which later images join. ``None`` for the first split.
        sampler: Name of the sampler (:data:`vlprompt.datasets.shots.SAMPLERS`); ``None`` for the data set's default.
        shots_file: A few-shot list (:mod:`vlprompt.datasets.shot_lists`) instead of a draw; it also sets ``shots`` and
            ``seed``.
        orientation: ``tag`` to turn images as their orientation tags say, ``ignore`` for the stored pixels.
        background: Colour behind transparent pixels, ``white``, ``black`` or ``#rrggbb``; ``none`` for the stored ones.
            Both have defaults: ``tag`` and ``white`` for your own images, ``ignore`` and ``none``, the reading of
            published protocols, for other data sets.

    Raises:
        ConfigError: If a name is unknown, a value is out of range, or the domains leave nothing to train or test on.
        ClassNameError: If the template does not contain ``{}`` exactly once.
        DataError: If the data are missing or cannot be used.
    """
    request = {
        "root": root, "shots": shots, "seed": seed, "classes": "all", "template": template, "source": source,
        "target": target, "split": split, "sampler": sampler, "shots_file": shots_file, "orientation": orientation,
        "background": background,
    }  # fmt: skip
    card = find_card(name).with_split(split)
    check_draw(shots, seed)
    if classes not in ("all", "base", "new"):
        raise ConfigError(f"data.classes is {classes!r}; accepted: all, base, new.")
    if template is not None and (template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1):
        raise ClassNameError(f"data.template is {template!r}; it must contain {{}} exactly once, for the class name.")
    if sampler is not None:
        find_sampler(sampler)
    reading = reading_of(own=card.own, orientation=orientation, background=background)
    whole = _read_as(read_dataset(card, root), reading)
    lists = _selected(card, whole, source, target)
    if shots_file is not None:
        chosen = read_shot_list(Path(shots_file))
        train, val = use_shot_list(chosen, lists, card.name, Path(shots_file))
        sampler, shots, seed = (chosen.header[key] for key in ("sampler", "shots", "seed"))
        validation = f"the images that {Path(shots_file).name} lists"
    else:
        sampler = sampler or ("elevater-v1" if card.multilabel and lists.train else lists.sampler)
        train, val = fewshot(lists.train, lists.val, shots, seed, sampler=sampler, sample_val=lists.sample_val)
        validation = validation_rule(sampler, shots, sample_val=lists.sample_val)
    if target and not lists.test:
        raise ConfigError(f"data.target is {list(target)}, which has no test images of the {classes} classes.")
    task = FewShotTask(
        name=card.name,
        class_names=list(lists.class_names),
        all_class_names=list(lists.class_names),
        template=card.template if template is None else template,
        train=train,
        val=val,
        test=list(lists.test),
        shots=shots,
        seed=seed,
        classes="all",
        split_sha256=whole.content_sha256(),
        shots_sha256=sha256_lines(sample.id for sample in train),
        card=card,
        sampler=str(sampler),
        root=None if root is None else str(root),
        source=tuple(source),
        target=tuple(target),
        request=request,
        validation=validation,
        lists=whole,
        reading=reading,
    )
    return task if classes == "all" else task.half(cast(Literal["base", "new"], classes))


def _read_as(lists: SplitLists, reading: Reading) -> SplitLists:
    """Return ``lists`` with another reading of the images.

    Raises:
        ConfigError: If it is not the plain one, and the images are in arrays, which have neither tags nor alpha.
    """
    if reading == PLAIN:
        return lists
    read = {
        split: [replace(sample, source=read_as(sample.source, reading)) for sample in getattr(lists, split)]
        for split in SPLITS
    }
    if all(read[split] == getattr(lists, split) for split in SPLITS):
        raise ConfigError(
            f"data.orientation is {reading.orientation!r} and data.background {reading.background!r}, but these images "
            "are stored as arrays, without tags and transparency; omit both"
        )
    return replace(lists, train=read["train"], val=read["val"], test=read["test"])


def _selected(card: Card, whole: SplitLists, source: Sequence[str], target: Sequence[str]) -> SplitLists:
    """Return the lists of the selected domains; if train and test share images, the domains must separate them."""
    lists = keep_domains(card, whole, source, target)
    if not card.same_images:
        return lists
    if not source:
        return replace(lists, train=[], val=[])  # test images must not be trained on
    tested = {sample.id for sample in lists.test}
    if shared := sum(sample.id in tested for sample in [*lists.train, *lists.val]):
        raise ConfigError(
            f"{shared:,} images of {card.name} would be both training and test images: name data.source and "
            f"data.target without a common domain. Domains: {', '.join(card.domains)}"
        )
    return lists
