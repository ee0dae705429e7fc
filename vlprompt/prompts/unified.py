"""Unified prompts: text context and image tokens from one small transformer block (UPT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlprompt.backbone.image_tower import ImageTower, VisualTokens
from vlprompt.backbone.text_tower import TextTower
from vlprompt.prompts.context import TextContext


class UnifiedPrompts(nn.Module):
    """``context.ctx`` ``[M, W]`` and ``visual`` ``[J, V, W]``, projected together (MVLPT: trainers/mvlpt.py 376-414).

    ``text_pre`` and ``image_pre`` map both to the width of ``block``, a transformer block of CLIP with a single head;
    ``text_post`` and ``image_post`` map them back. They are identities if a tower has the block's width. All prompts go
    through the block, which has no positions.

    Args:
        text: The text tower.
        image: The image tower; it must support tokens.
        length: M context vectors.
        count: V image tokens of each layer.
        depth: J layers that have image tokens; more than there are means all.
        width: The block's width.
        mixing: Whether prompts attend to each other; otherwise every prompt is a separate sequence.

    Raises:
        BackboneError: The image tower does not support tokens.
        ConfigError: The depth is below 1.
    """

    def __init__(
        self, text: TextTower, image: ImageTower, length: int, count: int, depth: int, width: int, *, mixing: bool
    ) -> None:
        from open_clip.transformer import QuickGELU, ResidualAttentionBlock

        super().__init__()
        image.require_tokens()
        depth = min(depth, image.layers)
        self.mixing = mixing
        self.context = TextContext(text, length)
        bound = math.sqrt(6 / (3 * image.patch_size**2 + image.width))
        self.visual = nn.Parameter(torch.empty(depth, count, image.width).uniform_(-bound, bound))
        self.text_pre, self.text_post = _there_and_back(text.width, width)
        self.image_pre, self.image_post = _there_and_back(image.width, width)
        self.block = ResidualAttentionBlock(width, 1, act_layer=QuickGELU, batch_first=True)

    def vectors(self) -> Tensor:
        """Return the context that enters the text tower, ``[M, W]``."""
        return self._projected(0)

    def tokens(self) -> VisualTokens:
        """Return the image tokens, placed after the class token and the first layer norm, without positions."""
        first, *deep = self._projected(1).unflatten(0, self.visual.shape[:2])
        return VisualTokens(first, dict(enumerate(deep, 1)), position="after_class", before_ln_pre=False)

    def _projected(self, side: int) -> Tensor:
        # In float32 for every precision of the trainer, as published.
        with torch.autocast(self.visual.device.type, enabled=False):
            if self.mixing:
                sequences = self._brought(0), self._brought(1)
                mixed = self.block(torch.cat(sequences)[None])[0].split([len(vectors) for vectors in sequences])[side]
            else:
                mixed = self.block(self._brought(side)[:, None])[:, 0]  # the result does not depend on the other side
            projected: Tensor = (self.text_post, self.image_post)[side](mixed)
        return projected

    def _brought(self, side: int) -> Tensor:
        """Return the text (0) ``[M, ...]`` or image (1) ``[J * V, ...]`` parameters at the block's width."""
        brought: Tensor = self.image_pre(self.visual.flatten(0, 1)) if side else self.text_pre(self.context.ctx)
        return brought


def _there_and_back(width: int, inner: int) -> tuple[nn.Module, nn.Module]:
    """Return linear maps from ``width`` to ``inner`` and back, or identities if both are equal."""
    if width == inner:
        return nn.Identity(), nn.Identity()
    return nn.Linear(width, inner), nn.Linear(inner, width)
