"""Approximated prompts of APT: added to the result of the attention instead of to its sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlprompt.prompts.context import CONTEXT_STD


class Diffusion(nn.Module):
    """Adds the contribution of prompt tokens to the result of an attention (APT).

    Official code: ViLT/vilt/modules/vision_transformer_apt.py 266-326.

    With the attention's input r and its result x, ``K = M + R2 R1 M``, ``A = relu(r K^T)``, the result is
    ``exp(sigma) (x + max_j A_j A M)``; no gradient goes through the maximum. Every token is processed separately.

    Parameters: ``tokens`` M ``[n, W]``, deviation 0.02; ``down`` R1, W to rank, deviation 1; ``up`` R2, rank to W,
    zero; ``sigma`` [], zero; with ``separate_values`` also ``values`` ``[n, W]``, zero, in place of M in the product
    with A.

    Args:
        count: n; with 0 the result is ``exp(sigma) x``.
        width: W.
        rank: Rank of the keys' update.
        separate_values: Learn separate values, so that training starts from the frozen tower; otherwise the random M
            changes it from the start.
        heads: Number of slices of the width, each with its affinities and maximum; 1 in the official code.
    """

    def __init__(self, count: int, width: int, rank: int = 4, separate_values: bool = False, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Parameter(torch.randn(count, width) * CONTEXT_STD)
        self.values = nn.Parameter(torch.zeros(count, width)) if separate_values else None
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.sigma = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def keys(self) -> Tensor:
        """Return K ``[n, W]``."""
        keys: Tensor = self.tokens + self.up(self.down(self.tokens))
        return keys

    def forward(self, normed: Tensor, result: Tensor) -> Tensor:
        """Return ``[..., W]`` from the attention's input r and its result x, ``[..., W]`` each."""
        if not len(self.tokens):
            return result * self.sigma.exp()
        values = self.tokens if self.values is None else self.values
        keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1) for x in (self.keys(), values))  # [H, n, d]
        queries = normed.to(keys.dtype).unflatten(-1, (self.heads, 1, -1))  # [..., H, 1, d]
        affinity = (queries @ keys.transpose(1, 2)).relu()  # [..., H, 1, n]
        weight = affinity.detach().amax(dim=-1, keepdim=True)
        updated: Tensor = self.sigma.exp() * (result + (weight * (affinity @ values)).flatten(-3))
        return updated
