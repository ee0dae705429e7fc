"""Projector from one feature space to another: linear, batch norm, ReLU, linear (PromptKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._dist import rank_and_size, sum_over_processes

MOMENTUM = 0.1
"""Weight of a batch in the running statistics: PyTorch's default, as in the official code."""


class Projector(nn.Module):
    """``linear1`` (D to E), batch norm, ReLU, ``linear2`` (E to E); the official code uses 1 x 1 convolutions.

    Args:
        dim: D, the width of the input features.
        out: E, the width of the output.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, out), nn.Linear(out, out)
        self.weight, self.bias = nn.Parameter(torch.ones(out)), nn.Parameter(torch.zeros(out))
        self.register_buffer("running_mean", torch.zeros(out))
        self.register_buffer("running_var", torch.ones(out))

    def forward(self, features: Tensor, *, learn: bool = False) -> Tensor:
        """Return ``[B, E]`` of ``features`` ``[B, D]``.

        With ``learn`` and more than one feature, batch norm uses the mean and variance of the batch, which also update
        the running statistics. Otherwise it uses the running statistics.
        """
        hidden = F.batch_norm(
            self.linear1(features),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=learn and len(features) > 1,
            momentum=MOMENTUM,
        )
        projected: Tensor = self.linear2(hidden.relu())
        return projected

    def average(self) -> None:
        """Average the running statistics over all processes."""
        processes = rank_and_size()[1]
        for statistic in (self.running_mean, self.running_var) if processes > 1 else ():
            sum_over_processes(statistic)
            statistic /= processes
