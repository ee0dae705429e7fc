"""Adapters: small networks on features that the frozen towers give."""

from __future__ import annotations

from torch import Tensor, nn


class FeatureAdapter(nn.Module):
    """CLIP-Adapter's bottleneck: raw features ``[B, D]`` to others ``[B, D]``; no biases, a ReLU after each layer.

    ``down`` ``[D // reduction, D]`` and ``up`` ``[D, D // reduction]`` start as PyTorch's linear layers do.
    """

    def __init__(self, embed_dim: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, embed_dim // reduction)
        self.down = nn.Linear(embed_dim, hidden, bias=False)
        self.up = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the adapted features ``[B, D]``; no value is below zero."""
        adapted: Tensor = self.up(self.down(features).relu()).relu()
        return adapted
