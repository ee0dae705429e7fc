"""The LightningModule of all methods: losses, logging, optimisation and scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlprompt._finite import check_finite, not_finite
from vlprompt._random import restored_random
from vlprompt.config.run import RecipeConfig, epochs_and_steps
from vlprompt.datasets.records import counted
from vlprompt.engine.metrics import MULTILABEL, ClassCounts, checked_logits, headline, make_scores, plain_score
from vlprompt.engine.recipe import learning_rate, make_optimizer
from vlprompt.errors import ConfigError, HeadError, NotFiniteError, bulleted
from vlprompt.methods import PromptMethod
from vlprompt.methods.episodic import ViewsMethod

FROZEN = "method.backbone."


class FrozenInside(pl.LightningModule):
    """A module with a ``method`` whose frozen backbone is not part of checkpoints.

    Args:
        method: Any method.

    Attributes:
        inputs_sha256: SHA-256 of the inputs of the training, written into checkpoints; a checkpoint of other inputs is
            refused. None: any checkpoint that fits is accepted.
    """

    advice: ClassVar[str] = ""
    """What to change if a tensor is no longer finite."""

    def __init__(self, method: PromptMethod) -> None:
        super().__init__()
        self.method = method
        self.inputs_sha256: str | None = None

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by name."""
        return self.method.trained_state()

    def may_be_infinite(self, name: str) -> bool:
        """Return whether infinity is a proper value of a learned tensor, here of none."""
        return False

    def check_learned(self) -> None:
        """Raise NotFiniteError if a learned tensor or the state of an optimiser is not finite.

        It is called at the end of an epoch, before the checkpoint is written, so the last one is finite.
        """
        tensors = {name: value for name, value in self.learned().items() if not self.may_be_infinite(name)}
        for optimizer in self.trainer.optimizers:
            for number, state in enumerate(optimizer.state.values()):
                named = {name: value for name, value in state.items() if isinstance(value, Tensor)}
                tensors |= {f"optimiser, tensor {number}, {name}": value for name, value in named.items()}
        check_finite(tensors, f"epoch {self.current_epoch} of {self.method.name}", self.advice)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the inputs of the training."""
        checkpoint["inputs_sha256"] = self.inputs_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another training, and one with values that are not finite.

        Raises:
            HeadError: It is one of these.
        """
        if self.inputs_sha256 not in (None, checkpoint.get("inputs_sha256")):
            raise HeadError("it was written by a training with other data, settings or weights")
        state = checkpoint["state_dict"].items()
        if lines := not_finite({name: value for name, value in state if not self.may_be_infinite(name)}):
            raise HeadError(f"it holds values that are not finite:\n{bulleted(lines, limit=6)}")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state without the frozen backbone."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if not _frozen(name)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state without the frozen backbone, which is not changed.

        Raises:
            HeadError: Names are missing or unknown, or a shape differs.
        """
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            raise HeadError(f"the checkpoint does not fit: {error}") from error
        missing = [name for name in result.missing_keys if not _frozen(name)]
        if strict and (missing or result.unexpected_keys):
            raise HeadError(f"the checkpoint does not fit: missing {missing}, unknown {result.unexpected_keys}")
        return result


@dataclass
class Selected:
    """The best epoch so far, from 0, with its scores on the validation images and its trained state."""

    epoch: int
    scores: dict[str, Any]
    state: dict[str, Tensor]


class PromptModule(FrozenInside):
    """Trains a method; usable with any ``pytorch_lightning.Trainer``.

    ``trainer.fit(vlprompt.PromptModule(method), datamodule)``. Batches are dictionaries with ``images``
    ``[B, 3, H, W]`` or raw ``features`` ``[B, D]``, ``labels`` ``[B]`` and, optionally, ``scale`` (see
    :class:`vlprompt.data.FewShotData`), or plain ``(images or features, labels)`` pairs. Checkpoints do not hold the
    frozen backbone.

    Args:
        method: Any method.
        recipe: Optimiser, schedule and selected epoch. The training, and the cosine, are as long as the trainer's
            ``max_epochs`` and ``max_steps`` say; ``recipe.epochs`` does not matter. ``recipe.steps`` stops any trainer
            that does not stop earlier, also one without a limit (``max_epochs=-1``).
        metric: Metric of validation and test (:data:`vlprompt.engine.metrics.METRICS`): ``accuracy`` or
            ``mean_per_class`` for labels ``[B]``, ``map`` or ``map_11point`` for multi-hot labels ``[B, C]``.

    Raises:
        ConfigError: A value of the recipe is not accepted, or the metric is unknown.
    """

    advice = "Lower the learning rate (--recipe.lr) or train in full precision (--trainer.precision 32-true)."

    def __init__(self, method: PromptMethod, recipe: RecipeConfig | None = None, metric: str = "accuracy") -> None:
        super().__init__(method)
        self.metric = metric
        self._given = recipe is not None
        self.recipe = recipe or RecipeConfig()
        self.scores = make_scores(metric, len(method.class_names))
        self.per_class = ClassCounts([], [], [])  # of the last evaluation
        self.selected: Selected | None = None
        self.scored_epoch: int | None = None  # the last one after which the validation images were scored
        self._ended = False
        self._validation: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]`` or raw features ``[B, D]``."""
        logits: Tensor = self.method(inputs)
        return logits

    # -- training -----------------------------------------------------------------------------------------------
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; each named term is logged per epoch as ``train/<term>``."""
        inputs, labels, scale = _unpack(batch)
        terms = self.method.losses(inputs, labels)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {float(term.detach()):g}" for name, term in terms.items())
            raise NotFiniteError(f"the loss is not finite in epoch {self.current_epoch} ({values}). {self.advice}")
        shown = {"train/loss": loss, **{f"train/{name}": term for name, term in terms.items()}}
        # ``scale`` turns the mean over processes into the mean over the global batch, for the gradient and the log.
        shown = {name: value.detach() * scale for name, value in shown.items()}
        self.log_dict(shown, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self.log("loss", shown["train/loss"], prog_bar=True, logger=False)
        return loss * scale

    def on_train_start(self) -> None:
        """End a resumed training that has made all its steps."""
        self._stop_after_steps()

    def on_train_epoch_start(self) -> None:
        """Note that the training goes on."""
        self._ended = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the training after ``recipe.steps`` optimiser steps."""
        self._stop_after_steps()

    def _stop_after_steps(self) -> None:
        if self.recipe.steps is not None and self.trainer.global_step >= self.recipe.steps:
            self.trainer.should_stop = True

    def length(self) -> RecipeConfig:
        """Return the recipe with the length of the training in the present trainer, in epochs or in steps.

        Raises:
            ConfigError: Neither the trainer nor the recipe limits the training.
        """
        recipe = self.recipe
        try:
            trainer = self.trainer
        except RuntimeError:  # there is none yet
            return recipe
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        limits = [steps for steps in (recipe.steps, trainer.max_steps) if steps is not None and steps >= 0]
        if limits:
            per_epoch = self._steps_per_epoch()
            steps = min([*limits, *([] if epochs is None else [epochs * per_epoch])])
            return replace(recipe, epochs=None, steps=max(steps, 1))
        if epochs is None:
            raise ConfigError(
                "the Trainer has no limit of epochs (max_epochs is -1), so the schedule has no length; accepted: "
                "max_epochs or max_steps of the Trainer, or recipe.steps"
            )
        return replace(recipe, epochs=max(epochs, 1))

    def on_train_epoch_end(self) -> None:
        """Call the method's objectives between epochs, then score the validation images if the recipe says so.

        The checkpoint of the epoch is written afterwards.
        """
        self.check_learned()
        length = self.length()
        epochs = length.epochs or epochs_and_steps(length, self._steps_per_epoch())[0]
        self.method.epoch_end(self.current_epoch, epochs)
        last = self.current_epoch == epochs - 1
        if last:
            self._end()
        if self.recipe.validates(self.current_epoch, last):
            scores, self.scored_epoch = self._validated(), self.current_epoch
            self.log(f"val/{self.metric}", headline(scores), rank_zero_only=False)
            if self.recipe.select == "best_val":
                self._select(self.current_epoch, scores)

    def on_fit_end(self) -> None:
        """Finish a training that was stopped early, and restore the parameters of the selected epoch."""
        if not self._ended:
            before = self.method.trained_state()
            self._end()
            after = self.method.trained_state()
            if self.selected is not None and any(not torch.equal(before[name], after[name]) for name in after):
                self._select(self.current_epoch - 1, self._validated())
        if self.selected is None and self.recipe.select == "best_val":  # it ended before the first validation
            self._select(self.current_epoch - 1, self._validated())
        if self.selected is not None:
            self.method.load_trained_state(self.selected.state)

    def _end(self) -> None:
        """Call the method's objectives at the end of the training."""
        self.method.train_end()
        check_finite(self.learned(), f"the end of the training of {self.method.name}", self.advice)
        self._ended = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the selected epoch so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ended"] = self._ended
        if self.selected is not None:
            checkpoint["selected"] = vars(self.selected)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the selected epoch so far.

        Raises:
            HeadError: The checkpoint is that of another training, damaged, or not finite.
        """
        super().on_load_checkpoint(checkpoint)
        selected = checkpoint.get("selected")
        try:
            self.selected = None if selected is None else Selected(**selected)
            lines = [] if self.selected is None else not_finite(self.selected.state)
        except (TypeError, AttributeError) as error:
            raise HeadError("its selected epoch is damaged") from error
        if lines:
            raise HeadError(f"its selected epoch holds values that are not finite:\n{bulleted(lines, limit=6)}")
        self._ended = bool(checkpoint.get("ended", False))

    def _select(self, epoch: int, scores: dict[str, Any]) -> None:
        """Keep the parameters after ``epoch`` if their validation ``scores`` are better than those of earlier epochs.

        Dassl does the same after every epoch (dassl/engine/trainer.py, after_epoch).
        """
        if self.selected is None or headline(scores) > headline(self.selected.scores):
            self.selected = Selected(epoch, scores, self.method.trained_state())

    def _validated(self) -> dict[str, Any]:
        """Return the scores of the validation images with the present parameters; nothing random is drawn."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self._validation is None:
            loader = None if data is None else data.val_dataloader()
            if not isinstance(loader, DataLoader):
                chosen = self.recipe.select == "best_val"
                what = "select is 'best_val'" if chosen else f"validate_every is {self.recipe.validate_every}"
                raise ConfigError(
                    f"recipe.{what}, but the training has no data module with validation images; "
                    f"accepted: {'last' if chosen else 'null'}"
                )
            self._validation = loader
        scores, training = make_scores(self.metric, len(self.method.class_names)).to(self.device), self.method.training
        self.method.eval()
        with restored_random(), torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for batch in self._validation:
                on_device = data.transfer_batch_to_device(batch, self.device, 0)
                inputs, labels, _ = _unpack(data.on_after_batch_transfer(on_device, 0))
                scores.update(checked_logits(self(inputs), self.method.name), labels)
        self.method.train(training)
        values, _ = scores.score()
        return plain_score(self.metric, {name: float(value) for name, value in values.items()})

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        if batches == float("inf"):
            raise ConfigError(
                "the loader does not say how many batches an epoch has, which a length in steps and a schedule by step "
                "need; accepted: limit_train_batches of the Trainer"
            )
        return -(-int(batches) // self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser over the method's parameter groups, and its schedule.

        Raises:
            ConfigError: The method has nothing to train or does not support several labels per image, or the warm-up
                is longer than the training.
        """
        check_trainable(self.method, self.metric)
        groups = self.method.parameter_groups(self.recipe.lr)
        if not groups:
            raise ConfigError(f"method {self.method.name!r} has nothing to train; evaluate it without fit")
        recipe, per_epoch = self.length(), 1
        if self._given and self.recipe.epochs is not None and recipe.epochs != self.recipe.epochs:
            own = counted(recipe.steps or 0, "step") if recipe.epochs is None else counted(recipe.epochs, "epoch")
            warnings.warn(
                f"recipe.epochs is {self.recipe.epochs}, and the Trainer trains for {own}; the schedule follows the "
                "Trainer",
                stacklevel=2,
            )
        if recipe.schedule == "step" or recipe.steps is not None:
            per_epoch = self._steps_per_epoch()
            check_warmup(recipe, per_epoch)
        optimizer = make_optimizer(groups, recipe)
        factors: list[Callable[[int], float]] = [
            partial(_factor, lr=group["lr"], recipe=recipe, per_epoch=per_epoch) for group in groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": recipe.schedule}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over all trainable parameters at the trainer's value, or else at ``recipe.gradient_clip``."""
        self.clip_gradients(optimizer, gradient_clip_val or self.recipe.gradient_clip, gradient_clip_algorithm)

    # -- evaluation ---------------------------------------------------------------------------------------------
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one validation batch."""
        self._count(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one test batch."""
        self._count(batch)

    def on_test_start(self) -> None:
        """Reset a method that learns from the stream of test images."""
        if isinstance(self.method, ViewsMethod):
            self.method.reset()

    def _count(self, batch: Any) -> None:
        inputs, labels, _ = _unpack(batch)
        with torch.set_grad_enabled(self.method.needs.gradient):
            logits = self(inputs)
        self.scores.update(checked_logits(logits.detach(), self.method.name), labels)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` in percent and the other measured values."""
        self.scored_epoch = self.current_epoch
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/correct``, ``test/total`` and, in percent, ``test/accuracy`` and the other metrics of one label.

        With several labels per image: ``test/total`` and their metrics, ``test/map`` etc.
        """
        self._finish("test")

    def _finish(self, stage: str) -> None:
        values, self.per_class = self.scores.score()
        self.scores.reset()
        # The values are already those of all processes, because torchmetrics gathers its states.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)


def check_warmup(recipe: RecipeConfig, per_epoch: int) -> None:
    """Raise ConfigError if the warm-up is longer than a training with ``per_epoch`` optimiser steps per epoch."""
    epochs, steps = epochs_and_steps(recipe, per_epoch)
    for unit, warmup, length in (("steps", recipe.warmup_steps, steps), ("epochs", recipe.warmup_epochs, epochs)):
        if warmup is not None and warmup > length:
            raise ConfigError(
                f"recipe.warmup_{unit} is {warmup}, and the training has {length} {unit}; accepted: 0 to {length}"
            )


def check_trainable(method: PromptMethod, metric: str) -> None:
    """Raise ConfigError if ``method`` would be trained on several labels per image with a loss for one.

    Cross-entropy would silently treat a multi-hot row as a probability vector.
    """
    if metric in MULTILABEL and method.trainable_parameters():
        raise ConfigError(
            f"method {method.name!r} is trained by cross-entropy over one label per image, but these images have "
            "several; evaluate instead: --method zeroshot, or a trained head with `vlprompt eval RUN`"
        )


def _frozen(name: str) -> bool:
    return name.startswith(FROZEN)


def _factor(at: int, *, lr: float, recipe: RecipeConfig, per_epoch: int) -> float:
    # LambdaLR multiplies the rate, so a group with rate 0 keeps it.
    return learning_rate(at, lr, recipe, per_epoch) / lr if lr else 0.0


def _unpack(batch: Any) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return inputs, labels and the loss scale of a batch."""
    if isinstance(batch, Mapping):
        inputs = batch["features"] if "features" in batch else batch["images"]
        return inputs, batch["labels"], batch.get("scale", 1.0)
    inputs, labels = batch
    return inputs, labels, 1.0
