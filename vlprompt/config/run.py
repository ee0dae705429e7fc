"""Configuration of a training run: validated dataclasses for YAML files, the command line and Python.

Field names are the keys of configuration files and of ``--a.b value`` overrides; annotations define types and bounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal

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
TransformKind = Literal["random", "random-tensor", "random-half", "center", "pad", "squash"]
WHOLE_TRANSFORMS: tuple[TransformKind, ...] = ("pad", "squash")
"""Kinds of ``data.transform`` that are the transform of test images as well."""
TestOrder = Literal["shuffled", "file"]
BACKGROUNDS = "white, black, none, or a colour such as '#80a0ff'"
GRAM = "gram:"
"""Prefix of ``RunConfig.init_from`` for a meta-training."""


def _names_a_run(init_from: str) -> bool:
    return bool(init_from.removeprefix(GRAM))


def is_background(colour: str) -> bool:
    """Return whether ``colour`` is accepted for ``data.background``."""
    named = isinstance(colour, str) and colour in ("white", "black", "none")
    return named or (isinstance(colour, str) and re.fullmatch("#[0-9a-f]{6}", colour) is not None)


@validated("backbone")
class BackboneConfig:
    """The frozen CLIP model: ``name``, ``pretrained``, ``precision``, ``image_size`` of :func:`vlprompt.load_backbone`.

    ``image_size`` requests another size than that of the weights, by interpolated position embeddings.
    """

    name: Name = "ViT-B-16"
    pretrained: Name | None = "openai"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    image_size: Annotated[Positive | None, Words("a side in pixels, or null for that of the weights")] = None


@validated("data")
class DataConfig:
    """Data of a run: data set, its folder, shots per class, class subset and training transform.

    ``transform``: ``random`` crops of training images (CoOp's), resized by torch (``random-tensor``) or of at least
    half of the area (``random-half``), or the test transform (``center``). ``pad`` (longer side to the image size, then
    a border) and ``squash`` (both sides) apply to test images as well, and the head records them.
    ``source`` and ``target`` name the training and test domains of a data set with domains; empty for all.
    ``split``, ``sampler`` and ``shots_file`` are those of :func:`vlprompt.load_dataset`.
    ``workers``: loader processes; None chooses the number (:class:`vlprompt.data.FewShotData`). ``on_bad_image``: an
    unreadable image stops the run, or is skipped and counted. ``cached_views``: random transforms per training image
    with cached features, if the image side is frozen; 0 for none, None for one per epoch if that is exact and small.
    ``bank``: folder of generated images made by ``vlprompt bank``, for methods that use them.
    ``order``: order of the test images for methods whose scores depend on it (TDA): a random order of ``seed``, as the
    official code draws one, or that of the data set's list, which is often sorted by class. ``statistics``: files of
    source statistics for methods that align with them (:func:`vlprompt.io.statistics.read_statistics`).
    ``orientation``: an image is turned as its orientation ``tag`` says, or the tag is ignored (``ignore``).
    ``background``: the colour behind transparent pixels, ``white``, ``black`` or ``#rrggbb``, or ``none`` for the
    colours that are stored there, mostly black. None is ``tag`` and ``white`` for your own images, and ``ignore`` and
    ``none``, the reading of the published protocols, for all other data sets.
    """

    name: Name = "demo"
    root: Name | None = None
    shots: Annotated[Literal[-1] | Positive, Words("1 or more images per class, or -1 for all of them")] = 16
    classes: Classes = "all"
    transform: TransformKind = "random"
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
    order: TestOrder = "shuffled"
    statistics: tuple[Name, ...] = ()
    orientation: Annotated[
        Literal["tag", "ignore"] | None, Words("'tag', 'ignore', or null for the reading that the data set has")
    ] = None
    background: Annotated[str, Holds(is_background, BACKGROUNDS)] | None = None

    def __post_init__(self) -> None:
        if self.cached_views and self.transform in ("center", *WHOLE_TRANSFORMS):
            raise ConfigError(
                f"data.cached_views is {self.cached_views} and data.transform is {self.transform!r}, which has no "
                "random views: features are always kept; accepted: 0 or null"
            )


@validated("recipe")
class RecipeConfig:
    """Optimisation of the trainable parameters; defaults as in Dassl: SGD, cosine per epoch, warm-up (dassl/optim).

    Length: ``epochs``, or in its place ``steps``, a number of optimiser steps, which may end within an epoch.
    ``drop_last``: whether the last batch of an epoch is dropped if it is not full (and not the only one).

    ``optimizer``: ``sgd`` with ``momentum``, or ``adam`` or ``adamw`` with ``momentum`` as first and 0.999 as second
    beta; ``weight_decay`` is added to the gradient except for ``adamw``.

    ``schedule``: the cosine from ``lr`` towards ``final_lr`` is updated once per ``epoch`` or after every optimiser
    ``step`` (CLIP-LoRA). ``warmup_epochs`` precede it: at ``warmup_lr`` (``warmup: constant``), or on a line to ``lr``
    that only begins at ``warmup_lr`` (``linear``). In their place ``warmup_steps`` optimiser steps rise on a line to
    ``lr``, and the cosine runs over the rest of the steps (VP: hjbahng/visual_prompting, utils.py).

    ``select``: the parameters after the ``last`` epoch, or ``best_val``: those after the first of the epochs with the
    best score on the validation images (Dassl: TEST.FINAL_MODEL). ``validate_every``: the validation images are scored
    after so many epochs each and after the last one; an epoch is chosen among these. None: after every epoch if one
    of them is chosen, else never. The scores are in ``metrics.jsonl``.

    A value given for ``epochs`` or ``steps`` replaces a default of the other one, and so do ``warmup_epochs`` and
    ``warmup_steps``.
    """

    epochs: Positive | None = 50
    steps: Positive | None = None
    batch_size: Positive = 32
    drop_last: bool = True
    lr: Above0 = 0.002
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["epoch", "step"] = "epoch"
    final_lr: NonNegative = 0.0
    warmup: Literal["constant", "linear"] = "constant"
    warmup_epochs: Count | None = 1
    warmup_steps: Count | None = None
    warmup_lr: Above0 = 1e-5
    momentum: Below1 = 0.9
    weight_decay: NonNegative = 5e-4
    gradient_clip: Annotated[Above0 | None, Words("a norm above 0, or null for none")] = None
    test_batch_size: Positive = 100
    select: Literal["last", "best_val"] = "last"
    validate_every: Annotated[Positive | None, Words("1 or more epochs, or null to leave the choice")] = None

    implied: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "epochs": {"steps": None},
        "steps": {"epochs": None},
        "warmup_epochs": {"warmup_steps": None},
        "warmup_steps": {"warmup_epochs": None, "warmup": "linear"},
    }
    """Values that fields get from a value of another one, unless they are given, too."""

    def __post_init__(self) -> None:
        problems = []
        if self.final_lr > self.lr:
            problems.append(f"recipe.final_lr is {self.final_lr}; accepted: 0 to recipe.lr ({self.lr})")
        for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
            values = [getattr(self, name) for name in (one, other)]
            if values.count(None) != 1:
                first, second = ("null" if value is None else value for value in values)
                problems.append(
                    f"recipe.{one} is {first} and recipe.{other} is {second}; accepted: a number for one of them, "
                    "null for the other"
                )
        for warmup, length in (("warmup_epochs", "epochs"), ("warmup_steps", "steps")):
            count, most = getattr(self, warmup), getattr(self, length)
            if count is not None and most is not None and count > most:
                problems.append(f"recipe.{warmup} is {count}; accepted: 0 to recipe.{length} ({most})")
        if self.warmup_steps is not None:
            if self.schedule != "step":
                problems.append(
                    f"recipe.warmup_steps is {self.warmup_steps} and recipe.schedule is {self.schedule!r}; "
                    "accepted: step with recipe.warmup_steps"
                )
            if self.warmup != "linear":
                problems.append(
                    f"recipe.warmup is {self.warmup!r}, but the rate rises on a line over recipe.warmup_steps "
                    f"({self.warmup_steps}); accepted: linear with recipe.warmup_steps"
                )
        if problems:
            raise ConfigError("\n".join(problems))

    def without_effect(self) -> dict[str, str]:
        """Return the fields that others switch off, with the reason."""
        if self.warmup_steps is not None:
            return {"warmup_lr": "recipe.warmup_steps rise from 0"}
        off: dict[str, str] = {}
        warmup, by_epoch = self.warmup_epochs or 0, self.schedule == "epoch"
        if self.epochs is not None and self.epochs - warmup <= (1 if by_epoch else 0):
            off["final_lr"] = f"{self.epochs - warmup} of recipe.epochs ({self.epochs}) follow the warm-up"
        if not warmup:
            return off | dict.fromkeys(("warmup", "warmup_lr"), "recipe.warmup_epochs is 0")
        if by_epoch and warmup == 1:
            off["warmup"] = "recipe.warmup_epochs is 1, and the line begins at recipe.warmup_lr"
        if warmup == self.epochs and (self.warmup == "constant" or "warmup" in off):
            constant = ("lr", "schedule") if self.warmup == "constant" else ("lr",)
            off |= dict.fromkeys(constant, f"all of recipe.epochs ({self.epochs}) are warm-up epochs")
        return off

    def validates(self, epoch: int, last: bool) -> bool:
        """Return whether the validation images are scored after ``epoch``, counted from 0; ``last``: it is the last."""
        every = self.validate_every or (1 if self.select == "best_val" else None)
        return every is not None and (last or (epoch + 1) % every == 0)

    def batches(self, images: int) -> int:
        """Return the number of batches of an epoch over ``images`` images."""
        whole = images // self.batch_size if self.drop_last else -(-images // self.batch_size)
        return max(whole, min(images, 1))

    def steps_per_epoch(self, images: int, accumulate: int = 1) -> int:
        """Return the number of optimiser steps of an epoch over ``images`` images.

        Args:
            images: Number of training images.
            accumulate: Batches per optimiser step.
        """
        return -(-self.batches(images) // accumulate)

    def length(self, images: int, accumulate: int = 1) -> tuple[int, int]:
        """Return the epochs, of which the last may end early, and the optimiser steps of the training.

        Args:
            images: Number of training images.
            accumulate: Batches per optimiser step.
        """
        return epochs_and_steps(self, self.steps_per_epoch(images, accumulate))


def epochs_and_steps(recipe: RecipeConfig, per_epoch: int) -> tuple[int, int]:
    """Return the epochs and the optimiser steps of a training with ``per_epoch`` optimiser steps per epoch."""
    if recipe.steps is not None:
        return -(-recipe.steps // max(per_epoch, 1)), recipe.steps
    assert recipe.epochs is not None
    return recipe.epochs, recipe.epochs * per_epoch


@validated("trainer")
class TrainerConfig:
    """Arguments of ``pytorch_lightning.Trainer``.

    ``precision``: prompts, their gradients and the optimiser's state are float32 in every case. Official code of
    CoOp, CoCoOp, KgCoOp and ProGrad keeps them in float16 with the towers (CoOp's train.py 94), that of MaPLe, IVLP,
    PromptSRC and PromptKD the text context at the input. Near 0.02, float16 numbers are 1.5e-5 apart: steps below
    7.6e-6, such as most of a warm-up epoch at a rate of 1e-5, change nothing there. ``backbone.precision: fp16`` has
    the same towers and does not round the prompts. MoCoOp's official autocast with scaled gradients is ``16-mixed``
    on a GPU; on a CPU ``16-mixed`` computes in bfloat16. VPT and R-AMT are officially trained in float32.
    """

    devices: Positive = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accumulate: Positive = 1
    progress: bool = True
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


@validated("")
class RunConfig:
    """One training run: method and its settings, backbone, data, recipe, trainer, seed and the folder for results.

    ``objectives`` holds loss terms and regularisers added to those of the method, with their settings;
    ``decomposition`` a low-rank update of the class tokens with its settings. ``init_from``: a run or a saved head that
    initialises the method, or ``gram:RUN`` for the initialisation and the gradient regulator of a meta-training; null
    for the method's default initialisation.
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
        """The folder of the meta-training in ``init_from`` if its regulator is used, else None."""
        named = self.init_from is not None and self.init_from.startswith(GRAM)
        return self.initial_head if named else None

    @property
    def initial_head(self) -> str | None:
        """The folder of the run, head or meta-training that initialises the method, if any."""
        return None if self.init_from is None else self.init_from.removeprefix(GRAM)

    def with_data(self, **values: Any) -> RunConfig:
        """Return a copy with ``values`` for fields of ``data``."""
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
