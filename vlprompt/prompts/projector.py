"""A learned map from one feature space into another: two linear maps around batch norm and ReLU (PromptKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._dist import rank_and_size, sum_over_processes

MOMENTUM = 0.1
"""How much of a batch enters the running statistics: PyTorch's default, which the official code has."""


class Projector(nn.Module):
    """``linear1`` (D to E), batch norm, ReLU, ``linear2`` (E to E); the official code has them as 1 x 1 convolutions.

    Args:
        dim: D, of the features that come in.
        out: E, of those that go out.
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

        With ``learn`` they are normalised by their own mean and variance, which also enter the running statistics.
        Otherwise, and where there is only one, whose variance says nothing, by the running statistics.
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
        """Make the running statistics those of all processes, each of which saw its share of the batches."""
        processes = rank_and_size()[1]
        for statistic in (self.running_mean, self.running_var) if processes > 1 else ():
            sum_over_processes(statistic)
            statistic /= processes
