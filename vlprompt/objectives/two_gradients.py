"""Objectives that combine two gradients: of the task, and of agreement with the frozen model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._dist import in_group, sum_over_processes
from vlprompt.objectives.base import Host, Objective, Step, Terms, unit
from vlprompt.prompts.zero_shot import template_features


class TwoGradients(Objective):
    """Base class of objectives that combine the task's gradient with that of agreement with the frozen model.

    The terms keep their values: ``ce`` and other earlier terms are the task, ``general`` is added. The gradient of the
    sum is the result of :meth:`combine`, so accumulation, clipping and several processes need no special case. Settings
    have ``temperature`` and ``templates``, the frozen model's prompts.
    """

    target: Tensor

    def combine(self, task: list[Tensor], general: list[Tensor]) -> list[Tensor]:
        """Return the combined gradient per tensor, from the two gradients of the global batch."""
        raise NotImplementedError

    def build(self, host: Host) -> None:
        """Encode the templates once."""
        target = template_features(host.backbone, host.class_names, self.settings.templates, average="raw")
        self.register_buffer("target", target, persistent=False)

    def general_loss(self, step: Step) -> Tensor:
        """Return the soft cross-entropy with the frozen model's predictions, times the squared temperature."""
        temperature = self.settings.temperature
        with torch.no_grad():
            frozen = self.host.backbone.logit_scale * unit(step.frozen_features()) @ self.target.t()
            target = (frozen / temperature).softmax(-1)
        loss: Tensor = F.cross_entropy(step.logits / temperature, target) * temperature**2
        return loss

    def add(self, step: Step, terms: Terms) -> Terms:
        """Return the terms and ``general``, with the combined gradient."""
        task, general = torch.stack(list(terms.values())).sum(), self.general_loss(step)
        values = {name: term.detach() for name, term in {**terms, "general": general}.items()}
        if not torch.is_grad_enabled():
            return values
        parameters = [parameter for _, parameter in self.host.trainable_parameters()]
        share = _share(len(step.labels), task.device)
        # The graph is kept for further objectives of this kind. Parameters without effect on a loss have gradient 0.
        first, second = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for loss in (task, general)
        )
        combined = self.combine(self._mean(first, share), self._mean(second, share))
        pull = torch.stack([(p * g).sum() for p, g in zip(parameters, combined, strict=True)]).sum()
        # The added value is zero, its derivative the combined gradient.
        name = next(iter(values))
        values[name] = values[name] + (pull - pull.detach())
        return values

    @staticmethod
    def _mean(gradients: tuple[Tensor, ...], share: float) -> list[Tensor]:
        """Return the gradients of the global batch, summed over processes."""
        scaled = [gradient * share for gradient in gradients] if share != 1 else list(gradients)
        return [sum_over_processes(gradient) for gradient in scaled]


def _share(count: int, device: torch.device) -> float:
    """Return this process's fraction of the global batch."""
    if not in_group():
        return 1.0
    return count / float(sum_over_processes(torch.tensor(float(count), device=device)))
