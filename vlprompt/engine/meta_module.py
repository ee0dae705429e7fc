"""The LightningModule of meta-training: one task per step, accumulated over the tasks of an outer step."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vlprompt.config.meta import MetaConfig
from vlprompt.engine.module import FrozenInside
from vlprompt.errors import NotFiniteError
from vlprompt.meta import Regulator, adapted, differentiable, inner_rates, task_loss
from vlprompt.methods import PromptMethod


class MetaModule(FrozenInside):
    """Learns the initialisation of ``method``'s trainable parameters and the regulator of its prompts' gradients.

    A batch is one task: ``support`` and ``query`` (images ``[N, 3, H, W]`` or raw features ``[N, D]``), the
    ``*_labels`` ``[N]``, the ``*_classes`` (texts), and ``feature`` ``[D]``, the mean unit image feature of the
    support. The Trainer accumulates the tasks of an outer step and averages over processes.

    Args:
        method: Any method; its trainable parameters are the initialisation.
        regulator: The regulator; None: inner steps follow the gradient.
        config: Settings of inner and outer training.
    """

    advice = "Lower the rates: --meta.inner_lr, --meta.lr"

    def __init__(self, method: PromptMethod, regulator: Regulator | None, config: MetaConfig) -> None:
        super().__init__(method)
        self.regulator, self.config = regulator, config

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors of method and regulator by name."""
        state = {} if self.regulator is None else self.regulator.state_dict()
        return super().learned() | {f"regulator.{name}": value for name, value in state.items()}

    def may_be_infinite(self, name: str) -> bool:
        """Return whether ``name`` is the bias of a gate of a regulator that starts open, where it is infinite."""
        opened = self.regulator is not None and math.isinf(self.regulator.settings.gate_bias)
        return opened and name.startswith("regulator.") and name.endswith("gate.bias")

    def on_train_epoch_end(self) -> None:
        """Check what is learned; the checkpoint is written afterwards."""
        self.check_learned()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the query loss after the inner steps; log it and the support loss before them."""
        with differentiable(self.config.order):
            support, query = self.losses(batch)
        if not torch.isfinite(query):
            raise NotFiniteError(
                f"the query loss is not finite at outer step {self.global_step} (support loss {float(support):g}). "
                f"{self.advice}"
            )
        self.log_dict({"train/support": support, "train/query": query.detach()}, **_EVERY_EPOCH)
        self.log("loss", query.detach(), prog_bar=True, logger=False)
        return query

    def losses(self, task: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the support loss before the inner steps (detached) and the query loss after them."""
        config, kind = self.config, self.config.loss
        learner = self.method.with_classes(task["support_classes"])
        first: list[Tensor] = []

        def support_loss(tensors: dict[str, Tensor]) -> Tensor:
            loss = task_loss(learner, tensors, task["support"], task["support_labels"], kind)
            first.append(loss.detach())
            return loss

        regulator = self.regulator
        tensors = adapted(
            support_loss,
            dict(self.method.trainable_parameters()),
            inner_rates(self.method, config.inner_lr),
            steps=config.inner_steps,
            order=config.order,
            regulate=None if regulator is None else lambda name, g: regulator(name, g, task["feature"]),
        )
        if task["query_classes"] != task["support_classes"]:
            learner = self.method.with_classes(task["query_classes"])
        query = task_loss(learner, tensors, task["query"], task["query_labels"], kind)
        return (first[0] if first else query.detach()), query

    def configure_optimizers(self) -> Any:
        """Return Adam over initialisation and regulator, with one rate each, and the schedule per outer step."""
        config = self.config
        groups = [{"params": [parameter for _, parameter in self.method.trainable_parameters()], "lr": config.lr}]
        if self.regulator is not None:
            groups.append({"params": list(self.regulator.parameters()), "lr": config.regulator_lr})
        optimizer = torch.optim.Adam(groups, lr=config.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        return max(1 - step / self.config.steps, 0.0) if self.config.schedule == "linear" else 1.0


_EVERY_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}


class GradientRegulation(pl.Callback):
    """Passes every prompt gradient through a frozen regulator, before clipping and the optimiser's step.

    At this point the gradients are accumulated, averaged over processes and unscaled (mixed precision).

    Args:
        regulator: The regulator; it is not trained.
        feature: ``[D]``, the mean unit image feature of the training images.
    """

    def __init__(self, regulator: Regulator, feature: Tensor) -> None:
        self.regulator, self.feature = regulator.requires_grad_(False), feature

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Replace the gradients."""
        assert isinstance(pl_module, FrozenInside)
        for name, prompt in pl_module.method.prompt_tensors():
            if prompt.grad is not None:
                self.regulator.to(prompt.device)
                regulated = self.regulator(name, prompt.grad, self.feature.to(prompt.device))
                prompt.grad.copy_(regulated)
