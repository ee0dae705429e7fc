"""What meta-training is told (GRAM, a reconstruction): plain, typed dataclasses, as :mod:`vlprompt.config.run`.

The paper's method section leaves most of this open; every choice is a field here, with the default of seed_methods 3.b.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlprompt.config.run import BackboneConfig, TrainerConfig, seed_problems


@dataclass
class PairsConfig:
    """Which image-caption pairs.

    ``source``: a data set with captions (``demo-pairs``), a .jsonl, .csv or .tsv file of images and captions, a folder
    of images with side-car texts, or webdataset shards (:func:`vlprompt.load_pairs`). ``root``: folder that the images'
    paths start from. ``workers``: loader processes; null chooses.
    """

    source: str = "demo-pairs"
    root: str | None = None
    workers: int | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        if self.workers is not None and self.workers < 0:
            return [f"pairs.workers is {self.workers}; accepted: 0 or more, or null to leave the choice"]
        return []


@dataclass
class TasksConfig:
    """How tasks are made of pairs: cross-modal hierarchical clustering, then draws.

    ``topics``: clusters of the captions. ``domains``: clusters of a topic's images; with ``domain_features`` of
    ``residuals``, of what their captions do not predict of them. ``least``: pairs below which a domain is dropped.
    ``support``, ``query``: pairs of a task, from two domains of one topic. ``labels``: every caption is its own class,
    or captions are grouped into ``classes`` pseudo-classes that support and query share. ``caption_tokens``: captions
    are cut to as many byte-pair tokens.
    """

    topics: int = 100
    domains: int = 4
    least: int = 32
    support: int = 16
    query: int = 16
    labels: Literal["captions", "clusters"] = "captions"
    classes: int = 4
    caption_tokens: int = 40
    domain_features: Literal["images", "residuals"] = "images"

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        least = {"topics": 1, "domains": 2, "least": 1, "support": 2, "query": 2, "classes": 2, "caption_tokens": 1}
        found = [
            f"tasks.{name} is {getattr(self, name)}; accepted: {smallest} or more"
            for name, smallest in least.items()
            if getattr(self, name) < smallest
        ]
        if self.labels == "clusters" and self.classes > self.support:
            found.append(
                f"tasks.classes is {self.classes} and tasks.support {self.support}; accepted: as many pairs as classes"
            )
        return found


@dataclass
class MetaConfig:
    """Bi-level training.

    ``steps``: outer steps, each over ``tasks_per_step`` tasks. ``inner_steps`` gradient steps at rate ``inner_lr`` on a
    task's support pairs. ``order``: ``first`` takes inner gradients for constants, ``second`` differentiates through
    them. ``loss``: ``infonce`` in both directions over captions as classes, or the host's own ``cross-entropy`` terms.
    ``lr``, ``regulator_lr``: Adam's rates of the initialisation and of the regulator. ``schedule``: rates fall to zero
    in a line, or stay. ``save_every``: outer steps between checkpoints.

    ``regulator``: ``rescale-gate``, ``sigmoid-gate`` or ``none``; ``sharing``, ``rank``, ``bottleneck`` and
    ``gate_bias`` as in :class:`vlprompt.meta.RegulatorSettings`.
    """

    steps: int = 10_000
    tasks_per_step: int = 4
    inner_steps: int = 1
    inner_lr: float = 0.002
    order: Literal["first", "second"] = "first"
    loss: Literal["infonce", "cross-entropy"] = "infonce"
    lr: float = 0.001
    regulator_lr: float = 1e-4
    schedule: Literal["linear", "constant"] = "linear"
    save_every: int = 100
    regulator: Literal["rescale-gate", "sigmoid-gate", "none"] = "rescale-gate"
    sharing: Literal["tensor", "shape"] = "tensor"
    rank: int = 64
    bottleneck: int = 8
    gate_bias: float = 4.0

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        least = {"steps": 1, "tasks_per_step": 1, "inner_steps": 0, "save_every": 1, "rank": 1, "bottleneck": 1}
        found = [
            f"meta.{name} is {getattr(self, name)}; accepted: {smallest} or more"
            for name, smallest in least.items()
            if getattr(self, name) < smallest
        ]
        for name in ("inner_lr", "lr", "regulator_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"meta.{name} is {getattr(self, name)}; accepted: 0 or more")
        if not found and self.steps % self.save_every:
            found.append(
                f"meta.steps is {self.steps} and meta.save_every {self.save_every}; accepted: a multiple of it, "
                "because training is kept and goes on at such places"
            )
        return found


@dataclass
class MetaRunConfig:
    """One meta-training: the host method, its backbone, the pairs, how tasks are made of them, and how it learns.

    ``name``: the run's folder under ``output``/gram; null makes one of method and pairs.
    """

    method: str = "coop"
    settings: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 1
    output: str = "runs"
    name: str | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with all values that do not need the method, backbone or pairs to be known."""
        parts = (self.backbone, self.pairs, self.tasks, self.meta, self.trainer)
        found = [text for part in parts for text in part.problems()]
        found += seed_problems(self.seed)
        if self.meta.tasks_per_step % self.trainer.devices:
            found.append(
                f"meta.tasks_per_step is {self.meta.tasks_per_step}, which {self.trainer.devices} processes "
                "(trainer.devices) cannot share evenly; accepted: a multiple of trainer.devices"
            )
        if self.trainer.precision == "16-mixed":
            found.append(
                "trainer.precision is '16-mixed', whose small inner gradients vanish without the scaling that only the "
                "outer ones get; accepted: '32-true', 'bf16-mixed'"
            )
        if self.trainer.accumulate != 1:
            found.append(
                f"trainer.accumulate is {self.trainer.accumulate}; accepted: 1, because tasks are accumulated "
                "already, one at a time: meta.tasks_per_step"
            )
        if self.name is not None and (not self.name.strip(".") or "/" in self.name or "\\" in self.name):
            found.append(f"name is {self.name!r}; accepted: a folder's name without slashes, or null")
        return found
