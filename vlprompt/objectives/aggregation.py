"""Gaussian prompt aggregation: weighted average of the parameters of all epochs (PromptSRC, equation 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.types import Above0, validated
from vlprompt.objectives.base import Host, Objective, register_objective


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
    """Return the normalised weights ``[epochs]`` of epochs 1 to ``epochs``, float64."""
    at = torch.arange(1, epochs + 1, dtype=torch.float64)
    weights = (-((at - mean) ** 2) / (2 * deviation**2)).exp()
    return weights / weights.sum()


@register_objective("aggregation")
class Aggregation(Objective):
    """Sets the trainable parameters to their weighted average over epochs at the end of the last epoch.

    The official code also averages the frozen weights, in half precision, which rounds them; here only trainable
    parameters are averaged, in float32. The sums are saved in checkpoints, so a resumed run gives the same result
    (the official code does not save them).
    """

    Settings = AggregationSettings
    settings: AggregationSettings

    def build(self, host: Host) -> None:
        """Start without sums: other objectives may add trainable parameters later."""
        self._sums: dict[str, str] = {}

    def prepare(self) -> None:
        """Create a sum for every trainable parameter."""
        for index, (name, parameter) in enumerate(self.host.trainable_parameters()):
            self._sums[name] = f"sum_{index}"
            self.register_buffer(f"sum_{index}", torch.zeros_like(parameter, dtype=torch.float32))

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Add this epoch's trainable parameters; after the last epoch replace them by the average."""
        weight = float(gaussian_weights(epochs, self.settings.mean, self.settings.deviation)[epoch])
        with torch.no_grad():
            for name, parameter in self.host.trainable_parameters():
                total: Tensor = getattr(self, self._sums[name])
                total += weight * parameter.float()
                if epoch == epochs - 1:
                    parameter.copy_(total)
                    total.zero_()
