"""ProGrad: a step never goes against what the frozen model knows (Zhu et al., ICCV 2023; equation 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlprompt.errors import ConfigError
from vlprompt.objectives.base import Host, Objective, Step, Terms, non_negative, register_objective, unit
from vlprompt.objectives.targets import template_features


@dataclass(frozen=True)
class ProjectedGradientSettings:
    """Settings of the projection.

    Attributes:
        strength: How much of the conflicting part is taken away: 1 all of it (0.8 in the README's runs at 8 and 16
            shots of Flowers102, DTD and EuroSAT).
        temperature: Divides both logits; the general loss is multiplied by its square.
        template: The frozen model's prompt with {} for the class name.
    """

    strength: float = 1.0
    temperature: float = 1.0
    template: str = "a photo of a {}."

    def __post_init__(self) -> None:
        non_negative(self, "strength", where="projected_gradient")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"objectives.projected_gradient.temperature is {self.temperature}; accepted: above 0")


@register_objective("projected_gradient")
class ProjectedGradient(Objective):
    """Takes from the task's gradient what conflicts with the gradient of agreeing with the frozen model.

    Per tensor: where task gradient g and general gradient k have a negative product, g loses ``strength`` times its
    part along k (BeierZhu/Prompt-align: dassl/engine/trainer.py 311-349). The terms keep their values, ``ce`` and
    whatever came before as the task, ``general`` beside them; the gradient of their sum is the projected one, so that
    accumulation, clipping and several processes need to know nothing of it.
    """

    Settings = ProjectedGradientSettings
    settings: ProjectedGradientSettings
    target: Tensor

    def build(self, host: Host) -> None:
        """Encode the template once."""
        target = template_features(host.backbone, host.class_names, [self.settings.template])
        self.register_buffer("target", target, persistent=False)

    def general_loss(self, step: Step) -> Tensor:
        """Return the soft cross-entropy with the frozen model's predictions, times the squared temperature."""
        temperature = self.settings.temperature
        with torch.no_grad():
            frozen = self.host.backbone.logit_scale * unit(step.frozen_features()) @ self.target.t()
            wanted = (frozen / temperature).softmax(-1)
        return F.cross_entropy(step.logits / temperature, wanted) * temperature**2

    def add(self, step: Step, terms: Terms) -> Terms:
        """Return the same terms and ``general``, with the projected gradient."""
        task, general = torch.stack(list(terms.values())).sum(), self.general_loss(step)
        values = {name: term.detach() for name, term in {**terms, "general": general}.items()}
        if not torch.is_grad_enabled():
            return values
        learnables = [parameter for _, parameter in self.host.learnables()]
        share = _share(len(step.labels), task.device)
        both = [self._mean(torch.autograd.grad(loss, learnables, retain_graph=True), share) for loss in (task, general)]
        first = next(iter(values))
        projected = [project(g, k, self.settings.strength) for g, k in zip(*both, strict=True)]
        pull = torch.stack([(p * g).sum() for p, g in zip(learnables, projected, strict=True)]).sum()
        # Zero in value, the projected gradient in its derivative.
        values[first] = values[first] + (pull - pull.detach())
        return values

    @staticmethod
    def _mean(gradients: tuple[Tensor, ...], share: float) -> list[Tensor]:
        """Return the gradients of the global batch, where several processes share it."""
        found = [gradient * share for gradient in gradients]
        if dist.is_available() and dist.is_initialized():
            for gradient in found:
                dist.all_reduce(gradient)
        return found


def project(task: Tensor, general: Tensor, strength: float) -> Tensor:
    """Return ``task`` without ``strength`` times its part along ``general``, if their product is negative."""
    length = general.norm()
    product = (task * general).sum()
    conflicts = (product < 0) & (length > 0)
    along = product / length.clamp(min=torch.finfo(length.dtype).tiny) ** 2 * general
    return torch.where(conflicts, task - strength * along.nan_to_num(), task)


def _share(count: int, device: torch.device) -> float:
    """Return this process's part of the global batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1.0
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return count / float(total)
