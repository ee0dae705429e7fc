"""What a run is told: plain, typed dataclasses that a YAML file, the command line and Python fill alike.

Field names are the keys of ``configs/<method>/<dataset>.yaml`` and of ``--a.b value`` overrides. ``problems()`` of each
part lists every value that is not accepted, in words, so that all of them can be reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Classes = Literal["all", "base", "new"]
GRAM = "gram:"
"""What ``RunConfig.init`` begins with."""


@dataclass
class BackboneConfig:
    """Which frozen CLIP: ``name`` and ``pretrained`` as in :func:`vlprompt.load_backbone`."""

    name: str = "ViT-B-16"
    pretrained: str | None = "openai"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        return [] if self.name else ["backbone.name is empty; accepted: what `vlprompt list backbones` shows"]


@dataclass
class DataConfig:
    """Which images: data set, where it lies, shots per class, class subset and training view.

    ``source`` and ``target`` name domains to train and to test on, where the data set has domains; empty for all.
    ``split``, ``sampler`` and ``shots_file`` are those of :func:`vlprompt.load_dataset`.
    ``workers``: loader processes; None chooses (:class:`vlprompt.data.FewShotData`). ``on_bad_image``: an image that
    cannot be read stops the run, or is left out and counted. ``cached_views``: random views per training image whose
    features are kept, where the image side is frozen; 0 for none, None for one per epoch where that is exact and small.
    ``bank``: folder of generated pictures that ``vlprompt bank`` made, for methods that look at them.
    """

    name: str = "demo"
    root: str | None = None
    shots: int = 16
    classes: Classes = "all"
    view: Literal["random", "random-tensor", "random-half", "center"] = "random"
    template: str | None = None
    workers: int | None = None
    source: list[str] = field(default_factory=list)
    target: list[str] = field(default_factory=list)
    split: str | None = None
    sampler: str | None = None
    shots_file: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    cached_views: int | None = None
    bank: str | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        found = []
        if self.shots < 1 and self.shots != -1:
            found.append(f"data.shots is {self.shots}; accepted: 1 or more images per class, or -1 for all of them")
        for name, what in (("workers", "loader processes"), ("cached_views", "views per image")):
            value = getattr(self, name)
            if value is not None and value < 0:
                found.append(f"data.{name} is {value}; accepted: 0 or more {what}, or null to leave the choice")
        if self.cached_views and self.view == "center":
            found.append(
                f"data.cached_views is {self.cached_views} and data.view is 'center', which has no random views: its "
                "features are always kept; accepted: 0 or null"
            )
        if self.template is not None and self.template.count("{}") != 1:
            found.append(f"data.template is {self.template!r}; accepted: a text with {{}} once, for the class name")
        return found


@dataclass
class RecipeConfig:
    """How learnables are trained; the defaults are Dassl's: SGD, cosine per epoch, warm-up (prompt_learners 2.4, 2.5).

    ``optimizer``: ``sgd`` with ``momentum``, or ``adam`` or ``adamw`` with ``momentum`` as first and 0.999 as second
    beta; ``weight_decay`` is part of the gradient but for ``adamw``. ``schedule``: the cosine falls once per ``epoch``
    or after every optimiser ``step`` (CLIP-LoRA), from ``lr`` towards ``final_lr``; a warm-up has whole epochs in
    either.
    """

    epochs: int = 50
    batch_size: int = 32
    lr: float = 0.002
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["epoch", "step"] = "epoch"
    final_lr: float = 0.0
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_clip: float | None = None
    test_batch_size: int = 100

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        found = []
        for name in ("epochs", "batch_size", "test_batch_size"):
            if getattr(self, name) < 1:
                found.append(f"recipe.{name} is {getattr(self, name)}; accepted: 1 or more")
        for name in ("lr", "warmup_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"recipe.{name} is {getattr(self, name)}; accepted: a number above 0")
        for name, accepted in (("optimizer", ("sgd", "adam", "adamw")), ("schedule", ("epoch", "step"))):
            if getattr(self, name) not in accepted:
                found.append(f"recipe.{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        if not 0 <= self.final_lr <= max(self.lr, 0.0):
            found.append(f"recipe.final_lr is {self.final_lr}; accepted: 0 to recipe.lr ({self.lr})")
        if not 0 <= self.warmup_epochs <= self.epochs:
            found.append(f"recipe.warmup_epochs is {self.warmup_epochs}; accepted: 0 to recipe.epochs ({self.epochs})")
        if not 0 <= self.momentum < 1:
            found.append(f"recipe.momentum is {self.momentum}; accepted: 0 to below 1")
        if not 0 <= self.weight_decay < float("inf"):
            found.append(f"recipe.weight_decay is {self.weight_decay}; accepted: 0 or more")
        if self.gradient_clip is not None and not 0 < self.gradient_clip < float("inf"):
            found.append(f"recipe.gradient_clip is {self.gradient_clip}; accepted: a norm above 0, or null for none")
        return found


@dataclass
class TrainerConfig:
    """What is handed to ``pytorch_lightning.Trainer``."""

    devices: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accumulate: int = 1
    progress: bool = True
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what is wrong with these values, in words."""
        return [
            f"trainer.{name} is {getattr(self, name)}; accepted: 1 or more"
            for name in ("devices", "accumulate")
            if getattr(self, name) < 1
        ]


def seed_problems(seed: int) -> list[str]:
    """Return what is wrong with a seed, in words."""
    return [] if 0 <= seed < 2**32 else [f"seed is {seed}; accepted: 0 to {2**32 - 1}"]


@dataclass
class RunConfig:
    """One training run: method and its settings, backbone, data, recipe, trainer, seed and the folder for results.

    ``objectives`` names loss terms and regularisers beside the method's own, each with its settings; ``decomposition``
    one low-rank update of the class tokens with its settings. ``start``: a run, or a saved head, whose learned tensors
    the method starts from; null for its own start. ``init``: ``gram:RUN``, a meta-training whose learned start and
    gradient regulator are both used.
    """

    method: str = "mocoop"
    settings: dict[str, Any] = field(default_factory=dict)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 1
    output: str = "runs"
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: str | None = None
    init: str | None = None
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)

    def with_data(self, **values: Any) -> RunConfig:
        """Return a copy with other ``values`` of the fields of ``data``."""
        return replace(self, data=replace(self.data, **values))

    def problems(self) -> list[str]:
        """Return what is wrong with all values that do not need the method, backbone or data to be known."""
        found = [text for part in (self.backbone, self.data, self.recipe, self.trainer) for text in part.problems()]
        found += seed_problems(self.seed)
        if self.init is not None and not self.init.removeprefix(GRAM) or not (self.init or GRAM).startswith(GRAM):
            found.append(f"init is {self.init!r}; accepted: gram:RUN, RUN being the folder of a meta-training; or null")
        if self.init is not None and self.start is not None:
            found.append(f"init is {self.init!r} and start {self.start!r}; accepted: one of the two")
        if self.recipe.batch_size % self.trainer.devices:
            found.append(
                f"recipe.batch_size is {self.recipe.batch_size} (the global batch), which {self.trainer.devices} "
                "processes (trainer.devices) cannot share evenly; accepted: a multiple of trainer.devices"
            )
        return found
