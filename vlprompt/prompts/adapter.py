"""Adapters: small networks on the features of frozen towers."""

from __future__ import annotations

from torch import Tensor, nn


class FeatureAdapter(nn.Module):
    """CLIP-Adapter's bottleneck on raw features ``[B, D]``: two layers without biases, a ReLU after each.

    ``down`` ``[D // reduction, D]`` and ``up`` ``[D, D // reduction]`` are initialised like PyTorch's linear layers.
    """

    def __init__(self, embed_dim: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, embed_dim // reduction)
        self.down = nn.Linear(embed_dim, hidden, bias=False)
        self.up = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the adapted features ``[B, D]``, all non-negative."""
        adapted: Tensor = self.up(self.down(features).relu()).relu()
        return adapted
