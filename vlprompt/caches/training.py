"""Training on frozen features: optimisers, schedules, orders from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, NonNegative, Positive, validated
from vlprompt.schedule import warm_cosine


@validated("settings.training")
class CacheRecipe:
    """Recipe of a trained cache: AdamW, with a cosine decay at every step.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per step.
        lr: Learning rate at the first step.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay.
        drop_last: Drop the last batch of an epoch if it is smaller, unless it is the only one, as Dassl.pytorch does
            (dassl/data/data_manager.py).
    """

    epochs: Count
    batch_size: Positive
    lr: NonNegative
    eps: NonNegative
    weight_decay: NonNegative
    drop_last: bool = False

    def batches(self, images: int) -> int:
        """Return the number of steps of an epoch over ``images`` images."""
        full, rest = divmod(images, self.batch_size)
        return full + (rest > 0 and not (self.drop_last and full))

    def optimizer(
        self, parameters: Sequence[nn.Parameter], period: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return AdamW, and a schedule that reaches zero after ``period`` steps and rises again later."""
        optimizer = torch.optim.AdamW(list(parameters), lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(period, 1))

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        names = ("batch_size", "lr", "eps", "weight_decay", "drop_last")
        return {} if self.epochs else switched_off("epochs is 0", *names)


@validated("settings.training")
class EpochRecipe(CacheRecipe):
    """Recipe of a trained cache: Adam with the schedule of Dassl.pytorch, one rate per epoch.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per step.
        lr: Learning rate after the warm-up, at the top of the cosine.
        eps: Adam's epsilon.
        weight_decay: Adam's weight decay.
        drop_last: Drop the last batch of an epoch if it is smaller, unless it is the only one.
        warmup_epochs: Epochs at ``warmup_lr``, before the cosine.
        warmup_lr: Their learning rate.
    """

    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 5e-4
    drop_last: bool = True
    warmup_epochs: Count = 1
    warmup_lr: NonNegative = 1e-5

    def optimizer(
        self, parameters: Sequence[nn.Parameter], period: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return Adam, and a schedule of ``period`` steps with one rate per epoch."""
        optimizer = torch.optim.Adam(list(parameters), lr=1.0, eps=self.eps, weight_decay=self.weight_decay)

        def rate(step: int) -> float:
            epoch = step * self.epochs // max(period, 1)
            return warm_cosine(epoch, self.epochs, self.lr, self.warmup_epochs, self.warmup_lr)

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off = super().without_effect()
        if not self.epochs or not self.warmup_epochs:
            off |= switched_off("there are no warm-up epochs", "warmup_lr")
        elif self.warmup_epochs >= self.epochs:
            off |= switched_off("warmup_epochs covers all epochs", "lr")
        return off


@dataclass(frozen=True)
class TrainingStep:
    """A training step that is done.

    Attributes:
        epoch: From 0.
        ends_epoch: Whether it is the last step of its epoch.
        lr: Its learning rate.
        rows: Indices ``[B]`` of its images.
        targets: Their labels ``[B]``; -1 for images without one.
        logits: Their logits ``[B, C]`` before the step.
        loss: The loss before the step.
        gradients: The gradient of each trained tensor, by name.
        terms: The parts of the loss, by name, where it has parts.
    """

    epoch: int
    ends_epoch: bool
    lr: float
    rows: Tensor
    targets: Tensor
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]
    terms: dict[str, float] = field(default_factory=dict)


def orders(images: int, epochs: int, seed: int, stream: int = 0) -> list[Tensor]:
    """Return an order ``[N]`` of ``images`` images for each epoch.

    Equal on every device and in every process; stages of one training have different ``stream`` numbers.
    """
    generator = torch.Generator().manual_seed(seed * 1009 + stream)
    return [torch.randperm(images, generator=generator) for _ in range(epochs)]
