"""Prompts that reach a block's tokens by diffusion, beside the attention instead of in its sequence (APT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlprompt.prompts.context import CONTEXT_STD


class Diffusion(nn.Module):
    """Adds what prompt tokens say to an attention's result (APT: ViLT/vilt/modules/vision_transformer_apt.py 266-326).

    With the attention's input r and its result x, ``K = M + R2 R1 M``, ``A = relu(r K^T)``, the result is
    ``exp(sigma) (x + max_j A_j A M)``; no gradient goes through the maximum. Tokens do not mix: each is told by itself.

    Learned: ``tokens`` M ``[n, W]``, deviation 0.02; ``down`` R1, W to rank, deviation 1; ``up`` R2, rank to W, zero;
    ``sigma`` [], zero; with separate values ``values`` ``[n, W]``, zero, in place of M beside A.

    Args:
        count: n; 0 leaves ``exp(sigma) x``.
        width: W.
        rank: Rank of the keys' update.
        separate_values: Learn values of their own, so that training starts from the frozen tower. Otherwise it does
            not: M is random.
        heads: In how many slices of the width tokens are asked and maxima taken; 1 in the official code.
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
        asking = normed.to(keys.dtype).unflatten(-1, (self.heads, 1, -1))  # [..., H, 1, d]
        affinity = (asking @ keys.transpose(1, 2)).relu()  # [..., H, 1, n]
        weight = affinity.detach().amax(dim=-1, keepdim=True)
        told: Tensor = self.sigma.exp() * (result + (weight * (affinity @ values)).flatten(-3))
        return told
