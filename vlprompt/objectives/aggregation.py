"""Gaussian prompt aggregation: the learnables of all epochs, averaged under a bell curve (PromptSRC, equation 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.types import Above0, validated
from vlprompt.objectives.base import Host, Objective, register_objective


@validated("objectives.aggregation")
class AggregationSettings:
    """Settings of the aggregation.

    Attributes:
        mean: The epoch, counted from 1, that weighs most.
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
    """Sets the learnables to their weighted average over epochs when the last epoch ends.

    The official code averages the frozen weights as well, in half precision, which rounds them; here only learnables
    are, in float32. The sums are part of a checkpoint, so that a resumed run ends as an uninterrupted one (the official
    code forgets them).
    """

    Settings = AggregationSettings
    settings: AggregationSettings

    def build(self, host: Host) -> None:
        """Have no sums yet: other objectives may bring learnables."""
        self._sums: dict[str, str] = {}

    def prepare(self) -> None:
        """Create a sum for every learnable."""
        for index, (name, parameter) in enumerate(self.host.trainable_parameters()):
            self._sums[name] = f"sum_{index}"
            self.register_buffer(f"sum_{index}", torch.zeros_like(parameter, dtype=torch.float32))

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Add this epoch's learnables; after the last epoch put the average in their place."""
        weight = float(gaussian_weights(epochs, self.settings.mean, self.settings.deviation)[epoch])
        with torch.no_grad():
            for name, parameter in self.host.trainable_parameters():
                total: Tensor = getattr(self, self._sums[name])
                total += weight * parameter.float()
                if epoch == epochs - 1:
                    parameter.copy_(total)
                    total.zero_()
