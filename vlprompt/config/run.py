"""Configuration of a training run: validated dataclasses that YAML files, the command line and Python fill alike.

Field names are the keys of configuration files and of ``--a.b value`` overrides; annotations hold types and bounds.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from vlprompt.config.types import (
    Above0,
    Below1,
    Count,
    Holds,
    Name,
    NonNegative,
    Positive,
    Seed,
    Template,
    Words,
    validated,
)
from vlprompt.errors import ConfigError

Classes = Literal["all", "base", "new"]
GRAM = "gram:"
"""Prefix of ``RunConfig.init_from`` for a meta-training."""


def _names_a_run(init_from: str) -> bool:
    return bool(init_from.removeprefix(GRAM))


@validated("backbone")
class BackboneConfig:
    """Which frozen CLIP: ``name`` and ``pretrained`` as in :func:`vlprompt.load_backbone`."""

    name: Name = "ViT-B-16"
    pretrained: Name | None = "openai"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"


@validated("data")
class DataConfig:
    """Which images: data set, where it lies, shots per class, class subset and training transform.

    ``source`` and ``target`` name domains to train and to test on, where the data set has domains; empty for all.
    ``split``, ``sampler`` and ``shots_file`` are those of :func:`vlprompt.load_dataset`.
    ``workers``: loader processes; None chooses (:class:`vlprompt.data.FewShotData`). ``on_bad_image``: an image that
    cannot be read stops the run, or is left out and counted. ``cached_views``: random views per training image whose
    features are kept, where the image side is frozen; 0 for none, None for one per epoch where that is exact and small.
    ``bank``: folder of generated pictures that ``vlprompt bank`` made, for methods that look at them.
    """

    name: Name = "demo"
    root: Name | None = None
    shots: Annotated[Literal[-1] | Positive, Words("1 or more images per class, or -1 for all of them")] = 16
    classes: Classes = "all"
    transform: Literal["random", "random-tensor", "random-half", "center"] = "random"
    template: Template | None = None
    workers: Annotated[Count | None, Words("0 or more loader processes, or null to leave the choice")] = None
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    split: Name | None = None
    sampler: Name | None = None
    shots_file: Name | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    cached_views: Annotated[Count | None, Words("0 or more views per image, or null to leave the choice")] = None
    bank: Name | None = None

    def __post_init__(self) -> None:
        if self.cached_views and self.transform == "center":
            raise ConfigError(
                f"data.cached_views is {self.cached_views} and data.transform is 'center', which has no random views: "
                "features are always kept; accepted: 0 or null"
            )


@validated("recipe")
class RecipeConfig:
    """How learnables are trained; the defaults are Dassl's: SGD, cosine per epoch, warm-up (dassl/optim).

    ``optimizer``: ``sgd`` with ``momentum``, or ``adam`` or ``adamw`` with ``momentum`` as first and 0.999 as second
    beta; ``weight_decay`` is part of the gradient but for ``adamw``. ``schedule``: the cosine falls once per ``epoch``
    or after every optimiser ``step`` (CLIP-LoRA), from ``lr`` towards ``final_lr``; a warm-up has whole epochs in
    either.
    """

    epochs: Positive = 50
    batch_size: Positive = 32
    lr: Above0 = 0.002
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["epoch", "step"] = "epoch"
    final_lr: NonNegative = 0.0
    warmup_epochs: Count = 1
    warmup_lr: Above0 = 1e-5
    momentum: Below1 = 0.9
    weight_decay: NonNegative = 5e-4
    gradient_clip: Annotated[Above0 | None, Words("a norm above 0, or null for none")] = None
    test_batch_size: Positive = 100

    def __post_init__(self) -> None:
        problems = []
        if self.final_lr > self.lr:
            problems.append(f"recipe.final_lr is {self.final_lr}; accepted: 0 to recipe.lr ({self.lr})")
        if self.warmup_epochs > self.epochs:
            problems.append(
                f"recipe.warmup_epochs is {self.warmup_epochs}; accepted: 0 to recipe.epochs ({self.epochs})"
            )
        if problems:
            raise ConfigError("\n".join(problems))


@validated("trainer")
class TrainerConfig:
    """What is handed to ``pytorch_lightning.Trainer``."""

    devices: Positive = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accumulate: Positive = 1
    progress: bool = True
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


@validated("")
class RunConfig:
    """One training run: method and its settings, backbone, data, recipe, trainer, seed and the folder for results.

    ``objectives`` names loss terms and regularisers beside the method's own, each with its settings; ``decomposition``
    one low-rank update of the class tokens with its settings. ``init_from``: a run or a saved head whose tensors
    initialise the method, or ``gram:RUN``, a meta-training whose initialisation and gradient regulator are both
    used; null for the method's own initialisation.
    """

    method: Name = "mocoop"
    settings: dict[str, Any] = field(default_factory=dict)
    backbone: BackboneConfig = BackboneConfig()
    data: DataConfig = DataConfig()
    recipe: RecipeConfig = RecipeConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: Seed = 1
    output: Name = "runs"
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    init_from: (
        Annotated[Name, Holds(_names_a_run, "the folder of a run or head, or gram:RUN for a meta-training")] | None
    ) = None
    decomposition: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def meta_training(self) -> str | None:
        """The folder of the meta-training that ``init_from`` names with its regulator, if any."""
        named = self.init_from is not None and self.init_from.startswith(GRAM)
        return self.initial_head if named else None

    @property
    def initial_head(self) -> str | None:
        """The folder of the run, head or meta-training whose tensors initialise the method, if any."""
        return None if self.init_from is None else self.init_from.removeprefix(GRAM)

    def with_data(self, **values: Any) -> RunConfig:
        """Return a copy with other ``values`` of the fields of ``data``."""
        return replace(self, data=replace(self.data, **values))

    def __post_init__(self) -> None:
        problems = []
        if self.recipe.batch_size % self.trainer.devices:
            problems.append(
                f"recipe.batch_size is {self.recipe.batch_size} (the global batch), which {self.trainer.devices} "
                "processes (trainer.devices) cannot share evenly; accepted: a multiple of trainer.devices"
            )
        if problems:
            raise ConfigError("\n".join(problems))
