"""Prompts in pixel space: a trainable border or patch added to every image, for any image tower."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._random import seeded_random
from vlprompt.backbone.image_tower import ImageTower
from vlprompt.errors import ConfigError
from vlprompt.prompts.draws import Draws

Shape = Literal["border", "fixed_patch", "random_patch"]


class PixelPrompt(nn.Module):
    """Pixels added to normalised images of side S, initially standard normal (VP: models/prompters.py).

    ``border``: ``up`` and ``down`` ``[3, p, S]``, ``left`` and ``right`` ``[3, S - 2p, p]``. Patches: ``patch``
    ``[3, p, p]``, at the top left, or at a place that every training step draws for the whole batch.

    Places of training steps are drawn with :class:`~vlprompt.prompts.Draws`: a resumed run continues with the same
    places. In evaluation the place is the first draw of seed 0.

    Args:
        image_size: S.
        size: p, the width of the border or the side of the patch.
        shape: Border or patch.

    Raises:
        ConfigError: The border leaves no pixel inside, or the patch is as large as the image.
    """

    def __init__(self, image_size: int, size: int, shape: Shape) -> None:
        super().__init__()
        most = (image_size - 1) // 2 if shape == "border" else image_size - 1
        if not 1 <= size <= most:
            raise ConfigError(
                f"settings.prompt_size is {size}; accepted: 1 to {most}, as shape {shape!r} in {image_size} pixels"
            )
        self.image_size, self.size, self.shape = image_size, size, shape
        if shape == "border":
            inner = image_size - 2 * size
            self.up, self.down = (nn.Parameter(torch.randn(3, size, image_size)) for _ in range(2))
            self.left, self.right = (nn.Parameter(torch.randn(3, inner, size)) for _ in range(2))
        else:
            self.patch = nn.Parameter(torch.randn(3, size, size))
        if shape == "random_patch":
            self.draws = Draws()

    def pixels(self) -> Tensor:
        """Return the pixels added to the images of this step, ``[3, S, S]``; zero outside the prompt."""
        side, p = self.image_size, self.size
        if self.shape == "border":
            middle = torch.cat([self.left, self.left.new_zeros(3, side - 2 * p, side - 2 * p), self.right], dim=2)
            return torch.cat([self.up, middle, self.down], dim=1)
        row, column = self.corner()
        return F.pad(self.patch, (column, side - p - column, row, side - p - row))

    def corner(self) -> tuple[int, int]:
        """Return row and column of the patch's top left pixel, 0 to S - p - 1; a training step draws a new place."""
        if self.shape != "random_patch":
            return 0, 0
        with self.draws.step(torch.device("cpu")) if self.training else seeded_random(0):
            row, column = torch.randint(self.image_size - self.size, (2,)).tolist()
        return row, column

    def encode(self, tower: ImageTower, images: Tensor) -> Tensor:
        """Return raw features ``[B, D]`` of ``images`` ``[B, 3, S, S]`` with the prompt added.

        If the tower can fold shared pixels into its parameters, as vision transformers can, nothing is added to the
        images and no gradient is computed for them.
        """
        pixels = self.pixels()
        folded = tower.folded(pixels)
        return tower.encode(images + pixels) if folded is None else tower.encode(images, overrides=folded)
