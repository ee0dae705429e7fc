"""Gaussian prompt aggregation: weighted average of the parameters of all epochs (PromptSRC, equation 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.types import Above0, validated
from vlprompt.objectives.base import Host, Objective, register_objective

_NONE = torch.finfo(torch.float64).min
"""Logarithm of the total weight before the first epoch; finite, because checkpoints with infinities are refused."""


@validated("objectives.aggregation")
class AggregationSettings:
    """Settings of the aggregation.

    Attributes:
        mean: Epoch with the largest weight, counted from 1.
        deviation: Width of the curve in epochs.
    """

    mean: float = 15.0
    deviation: Above0 = 1.0


def gaussian_weights(epochs: int, mean: float, deviation: float) -> Tensor:
    """Return the normalised weights ``[epochs]`` of epochs 1 to ``epochs``, float64; far from ``mean``, too."""
    at = torch.arange(1, epochs + 1, dtype=torch.float64)
    return log_weight(at, mean, deviation).softmax(dim=0)


def log_weight(at: Tensor, mean: float, deviation: float) -> Tensor:
    """Return the logarithm of the weight, before normalisation, of the epochs ``at``, counted from 1."""
    return -0.5 * ((at - mean) / deviation) ** 2


@register_objective("aggregation")
class Aggregation(Objective):
    """Sets the trainable parameters to their weighted average over epochs when the training ends.

    The official code also averages the frozen weights, in half precision, which rounds them; here only trainable
    parameters are averaged, in float32. The average so far is saved in checkpoints, so a resumed run gives the same
    result (the official code does not save its sums). Weights are normalised over the epochs that were trained: their
    logarithms are added, so that no curve underflows and a training that ends early has an average, too.
    """

    Settings = AggregationSettings
    settings: AggregationSettings
    log_total: Tensor

    def build(self, host: Host) -> None:
        """Start without averages: other objectives may add trainable parameters later."""
        self._averages: dict[str, str] = {}
        self.register_buffer("log_total", torch.tensor(_NONE, dtype=torch.float64))

    def prepare(self) -> None:
        """Create an average for every trainable parameter."""
        for index, (name, parameter) in enumerate(self.host.trainable_parameters()):
            self._averages[name] = f"average_{index}"
            self.register_buffer(f"average_{index}", torch.zeros_like(parameter, dtype=torch.float32))

    @torch.no_grad()
    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Add this epoch's trainable parameters to their averages."""
        at = torch.tensor(epoch + 1, dtype=torch.float64, device=self.log_total.device)
        log = log_weight(at, self.settings.mean, self.settings.deviation)
        self.log_total.copy_(torch.logaddexp(self.log_total, log))
        share = float((log - self.log_total).exp())
        for name, parameter in self.host.trainable_parameters():
            average: Tensor = getattr(self, self._averages[name])
            average.lerp_(parameter.float(), share)

    @torch.no_grad()
    def train_end(self) -> None:
        """Replace the trainable parameters by their averages, if an epoch has ended."""
        if float(self.log_total) > _NONE:
            for name, parameter in self.host.trainable_parameters():
                parameter.copy_(getattr(self, self._averages[name]))
