"""Prompts of several layers: visual tokens, deep text context, and image prompts computed from text prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlprompt.backbone.image_tower import ImageTower, VisualTokens
from vlprompt.backbone.layout import TokenLayout
from vlprompt.backbone.text_tower import TextTower
from vlprompt.config.effect import switched_off
from vlprompt.errors import ConfigError
from vlprompt.prompts.context import CONTEXT_STD, context_layout
from vlprompt.prompts.words import words_of

#: Initial words are used with up to this many vectors; with more the official code uses noise (MaPLe, PromptSRC).
MOST_WORDS = 4


def unused_words(length: int) -> dict[str, str]:
    """Return the setting ``context_init`` with the reason why ``length`` vectors do not use it, if they do not."""
    reason = f"settings.context_length is {length}, and words initialise at most {MOST_WORDS} vectors"
    return switched_off(reason, "context_init") if length > MOST_WORDS else {}


def _noise(count: int, *shape: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.randn(shape) * CONTEXT_STD) for _ in range(count)])


class VisualPrompts(nn.Module):
    """Tokens for a vision transformer: ``input`` ``[V, W]`` and ``deep`` ``[V, W]`` for layers 1 to J - 1 (VPT).

    Args:
        tower: The image tower; it must support tokens.
        count: V tokens.
        depth: J layers with tokens at their input; 1 is VPT-shallow, more than the tower has means all.

    Raises:
        BackboneError: The tower does not support tokens.
    """

    def __init__(self, tower: ImageTower, count: int, depth: int) -> None:
        super().__init__()
        tower.require_tokens()
        depth = min(depth, tower.layers)
        self.input = nn.Parameter(torch.randn(count, tower.width) * CONTEXT_STD)
        self.deep = _noise(depth - 1, count, tower.width)

    def tokens(self) -> VisualTokens:
        """Return the tokens, placed after the patches, before the first layer norm, without positions (VPT, 3.5)."""
        return VisualTokens(self.input, dict(enumerate(self.deep, 1)))


class DeepContext(nn.Module):
    """Text context ``ctx`` ``[M, W]`` and ``deep`` ``[M, W]`` that replaces it at the input of layers 1 to J - 1.

    Args:
        tower: The text tower.
        length: M.
        words: Initial words. The first M tokens are trained, the rest remains fixed before the name. With more than
            four vectors noise is used instead, as in the code of MaPLe and PromptSRC.
        depth: J layers with context.

    Raises:
        ConfigError: The words have fewer tokens than vectors.
    """

    def __init__(self, tower: TextTower, length: int, words: str, depth: int) -> None:
        super().__init__()
        depth = min(depth, tower.layers)
        words = words_of(words) if length <= MOST_WORDS else ""
        self.length, self.placeholder = length, words or " ".join(["X"] * length)
        tokens = tower.tokens(self.placeholder)[1:-1]
        if len(tokens) < length:
            raise ConfigError(
                f"settings.context_init {words!r} has {len(tokens)} tokens for {length} vectors; use more words"
            )
        start = tower.embed(tokens[:length]) if words else torch.randn(length, tower.width) * CONTEXT_STD
        self.ctx = nn.Parameter(start)
        self.deep = _noise(depth - 1, length, tower.width)

    def layout(self, tower: TextTower, class_names: Sequence[str]) -> TokenLayout:
        """Return the layout of the prompts of ``class_names``."""
        return context_layout(tower, class_names, self.placeholder, self.length, "end")

    def layers(self) -> Mapping[int, Tensor]:
        """Return the deep vectors by layer."""
        return dict(enumerate(self.deep, 1))


class CoupledPrompts(nn.Module):
    """Deep text context, and image tokens as linear maps of it: ``proj`` and ``projections`` (MaPLe, section 3).

    Args:
        text: The text tower.
        image: The image tower; it must support tokens.
        length: M vectors, and as many image tokens.
        words: As in :class:`DeepContext`.
        depth: J layers of both towers.
    """

    def __init__(self, text: TextTower, image: ImageTower, length: int, words: str, depth: int) -> None:
        super().__init__()
        image.require_tokens()
        depth = min(depth, text.layers, image.layers)
        self.context = DeepContext(text, length, words, depth)
        self.proj = nn.Linear(text.width, image.width)
        # All deep maps are initialised as copies of one map (maple.py 129-130).
        initial = nn.Linear(text.width, image.width)
        self.projections = nn.ModuleList([nn.Linear(text.width, image.width) for _ in range(depth - 1)])
        for projection in self.projections:
            projection.load_state_dict(initial.state_dict())

    def image_prompts(self) -> list[Tensor]:
        """Return the image tokens ``[M, W]`` of the input and of the deeper layers."""
        deep = [project(vectors) for project, vectors in zip(self.projections, self.context.deep, strict=True)]
        return [self.proj(self.context.ctx), *deep]

    def tokens(self) -> VisualTokens:
        """Return the image tokens, placed as VPT's."""
        first, *deep = self.image_prompts()
        return VisualTokens(first, dict(enumerate(deep, 1)))


class MetaNet(nn.Module):
    """CoCoOp's meta-network: maps unit image features ``[B, D]`` to the shift ``[B, W]`` of all context vectors.

    ``linear1`` (D to D // 16), ReLU, ``linear2`` (to W).
    """

    def __init__(self, embed_dim: int, width: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, embed_dim // reduction)
        self.linear1 = nn.Linear(embed_dim, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """Return the shifts ``[B, W]``."""
        shift: Tensor = self.linear2(self.linear1(features).relu())
        return shift
