"""Configuration of meta-training (GRAM, a reconstruction): validated dataclasses, as in :mod:`vlprompt.config.run`.

The method section of the paper (arXiv 2303.06571) is not available and there is no official code, so every choice is a
field.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan

from vlprompt.config.effect import switched_off
from vlprompt.config.run import BackboneConfig, TrainerConfig
from vlprompt.config.types import Count, Ge, Holds, Name, NonNegative, Positive, Seed, Words, validated
from vlprompt.errors import ConfigError

AtLeast2 = Annotated[int, Ge(2)]
Bias = Annotated[float, AllowInfNan(True), Holds(lambda bias: bias > float("-inf"), "a number, or .inf for open gates")]


def _is_folder_name(name: str) -> bool:
    return bool(name.strip(".")) and "/" not in name and "\\" not in name


@validated("pairs")
class PairsConfig:
    """Selection of image-caption pairs.

    ``source``: a data set with captions (``demo-pairs``), a .jsonl, .csv or .tsv file of images and captions, a folder
    of images with side-car texts, or webdataset shards (:func:`vlprompt.load_pairs`). ``root``: base folder of the
    image paths. ``workers``: loader processes; null chooses the number automatically.
    """

    source: Name = "demo-pairs"
    root: Name | None = None
    workers: Annotated[Count | None, Words("0 or more, or null to leave the choice")] = None


@validated("tasks")
class TasksConfig:
    """How tasks are built from pairs: cross-modal hierarchical clustering, then random draws.

    ``topics``: number of caption clusters. ``domains``: number of image clusters per topic; with ``domain_features``
    set to ``residuals``, the part of the image features that the captions do not predict is clustered. ``least``:
    domains with fewer pairs are dropped. ``support``, ``query``: pairs per task, from two domains of one topic.
    ``labels``: each caption is a class, or captions are grouped into ``classes`` pseudo-classes that support and query
    share. ``caption_tokens``: maximum length of a caption in byte-pair tokens.
    """

    topics: Positive = 100
    domains: AtLeast2 = 4
    least: Positive = 32
    support: AtLeast2 = 16
    query: AtLeast2 = 16
    labels: Literal["captions", "clusters"] = "captions"
    classes: AtLeast2 = 4
    caption_tokens: Positive = 40
    domain_features: Literal["images", "residuals"] = "images"

    def without_effect(self) -> dict[str, str]:
        """Return the fields that others switch off, with the reason."""
        return {} if self.labels == "clusters" else {"classes": f"tasks.labels is {self.labels!r}"}

    def __post_init__(self) -> None:
        if self.labels == "clusters" and self.classes > self.support:
            raise ConfigError(
                f"tasks.classes is {self.classes} and tasks.support {self.support}; accepted: as many pairs as classes"
            )


@validated("meta")
class MetaConfig:
    """Bi-level training.

    ``steps``: outer steps, each over ``tasks_per_step`` tasks. ``inner_steps``: gradient steps at rate ``inner_lr`` on
    the support pairs of a task. ``order``: ``first`` treats inner gradients as constants, ``second`` differentiates
    through them. ``loss``: ``infonce`` in both directions with captions as classes, or the method's ``cross-entropy``
    terms. ``lr``, ``regulator_lr``: Adam's learning rates of the initialisation and of the regulator. ``schedule``:
    rates decay linearly to zero or stay constant. ``save_every``: outer steps between checkpoints.

    ``regulator``: ``rescale-gate``, ``sigmoid-gate`` or ``none``; ``sharing``, ``rank``, ``bottleneck`` and
    ``gate_bias`` as in :class:`vlprompt.meta.RegulatorSettings`.
    """

    steps: Positive = 10_000
    tasks_per_step: Positive = 4
    inner_steps: Count = 1
    inner_lr: NonNegative = 0.002
    order: Literal["first", "second"] = "first"
    loss: Literal["infonce", "cross-entropy"] = "infonce"
    lr: NonNegative = 0.001
    regulator_lr: NonNegative = 1e-4
    schedule: Literal["linear", "constant"] = "linear"
    save_every: Positive = 100
    regulator: Literal["rescale-gate", "sigmoid-gate", "none"] = "rescale-gate"
    sharing: Literal["tensor", "shape"] = "tensor"
    rank: Positive = 64
    bottleneck: Positive = 8
    gate_bias: Bias = 4.0

    def without_effect(self) -> dict[str, str]:
        """Return the fields that others switch off, with the reason."""
        off = {} if self.inner_steps else switched_off("meta.inner_steps is 0", "inner_lr", "order")
        unused = {
            "none": ("sharing", "rank", "bottleneck", "gate_bias", "regulator_lr"),
            "rescale-gate": ("bottleneck",),
            "sigmoid-gate": ("rank",),
        }
        return off | switched_off(f"meta.regulator is {self.regulator!r}", *unused[self.regulator])

    def __post_init__(self) -> None:
        if self.steps % self.save_every:
            raise ConfigError(
                f"meta.steps is {self.steps} and meta.save_every {self.save_every}; accepted: a multiple of it, "
                "because training is kept and goes on at such places"
            )


@validated("")
class MetaRunConfig:
    """One meta-training: the method, its backbone, the pairs, how tasks are built from them, and the optimisation.

    ``name``: the run folder under ``output``/gram; null derives it from method and pairs.
    """

    method: Name = "coop"
    settings: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)
    backbone: BackboneConfig = BackboneConfig()
    pairs: PairsConfig = PairsConfig()
    tasks: TasksConfig = TasksConfig()
    meta: MetaConfig = MetaConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: Seed = 1
    output: Name = "runs"
    name: Annotated[str, Holds(_is_folder_name, "a folder's name without slashes")] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.meta.tasks_per_step % self.trainer.devices:
            problems.append(
                f"meta.tasks_per_step is {self.meta.tasks_per_step}, which {self.trainer.devices} processes "
                "(trainer.devices) cannot share evenly; accepted: a multiple of trainer.devices"
            )
        if self.trainer.precision == "16-mixed":
            problems.append(
                "trainer.precision is '16-mixed', whose small inner gradients vanish without the scaling that only the "
                "outer ones get; accepted: '32-true', 'bf16-mixed'"
            )
        if self.trainer.accumulate != 1:
            problems.append(
                f"trainer.accumulate is {self.trainer.accumulate}; accepted: 1, because tasks are accumulated "
                "already, one at a time: meta.tasks_per_step"
            )
        if problems:
            raise ConfigError("\n".join(problems))
