"""Trainable copies of the image tower's layer norms; the backbone is not changed."""

from __future__ import annotations

from torch import Tensor, nn

from vlprompt.backbone.image_tower import ImageTower


class TunedLayerNorms(nn.Module):
    """Copies of ``ln_1`` and ``ln_2`` (weight and bias) of every image block; float32.

    Args:
        tower: The image tower to copy from; it must be a vision transformer.

    Raises:
        BackboneError: The tower has no such layer norms.
    """

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.names = list(tower.layer_norm_parameters())
        self.values = nn.ParameterList(
            nn.Parameter(value.detach().float().clone()) for value in tower.layer_norm_parameters().values()
        )

    def overrides(self) -> dict[str, Tensor]:
        """Return ``{visual parameter name: tensor}`` for :meth:`ImageTower.encode`."""
        return dict(zip(self.names, self.values, strict=True))
