"""CoCoOp: context that every image shifts (Zhou et al., CVPR 2022; arXiv 2203.05557, equations 4 and 5).

A small network maps the unit image feature to a vector that is added to all context vectors; the prompts of an image
are ``[v_1 + pi(x)] ... [v_M + pi(x)] [class c] .``. The official code encodes the classes once per image and
uses batches of one image; here the prompts of a batch are encoded together, and an image's classes share its context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Ge, Le, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts import MetaNet, TextContext
from vlprompt.prompts.context import ContextLength


@validated("settings")
class CoCoOpSettings:
    """Settings of CoCoOp.

    Attributes:
        context_length: M, when no words are given.
        context_init: Initial words; M is then their number. Empty: normal noise of deviation 0.02.
        images_at_once: Images whose prompts are encoded together. More images need more memory; the result is the same.
    """

    context_length: ContextLength = 4
    context_init: str = "a photo of a"
    images_at_once: Annotated[int, Ge(1), Le(10_000)] = 16

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        reason = f"settings.context_init is {self.context_init!r}, whose words are counted"
        return switched_off(reason, "context_length") if self.context_init else {}


@register("cocoop")
class CoCoOp(PromptMethod):
    """Context vectors and the meta-network that shifts them."""

    Settings = CoCoOpSettings
    recipe = RecipeConfig(epochs=10, batch_size=1)
    text_features_per = "image"
    settings: CoCoOpSettings

    def build(self) -> None:
        """Create ``prompt.ctx`` ``[M, W]`` and ``meta_net``."""
        settings, text = self.settings, self.backbone.text
        self.prompt = TextContext(text, settings.context_length, settings.context_init)
        self.meta_net = MetaNet(self.backbone.embed_dim, text.width)
        self.layout = self.prompt.layout(text, self.class_names, "end")

    def contexts(self, unit_image: Tensor) -> Tensor:
        """Return the shifted context ``[B, M, W]`` of unit image features ``[B, D]``."""
        shifted: Tensor = self.prompt.ctx + self.meta_net(unit_image).unsqueeze(1)
        return shifted

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return each image's classifier ``[B, C, D]`` of raw image ``features`` ``[B, D]``.

        Without features, return ``[C, D]``: the classifier of the unshifted context, an approximation for code that
        takes only one matrix.
        """
        if features is None:
            return self.unit_text(self.encode_text(self.layout, self.prompt.ctx)[0])
        return self._weights(self.unit_image(features))

    def _weights(self, unit_image: Tensor) -> Tensor:
        if not len(unit_image):
            return unit_image.new_zeros(0, len(self.class_names), unit_image.shape[-1])
        contexts = self.contexts(unit_image).split(self.settings.images_at_once)
        encode: Callable[[Tensor], Tensor] = lambda ctx: self.unit_text(self.encode_text(self.layout, ctx))  # noqa: E731
        if len(contexts) > 1 and torch.is_grad_enabled():
            return torch.cat([checkpoint(encode, context, use_reentrant=False) for context in contexts])
        return torch.cat([encode(context) for context in contexts])

    def score(self, unit_image: Tensor, text_features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of unit features ``[B, D]`` and each image's classifier ``[B, C, D]``."""
        return self.backbone.logit_scale * torch.einsum("bd,bcd->bc", unit_image, text_features)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]``: every image is scored with its prompts."""
        unit_image = self.unit_image(features)
        return self.score(unit_image, self._weights(unit_image))

    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return each image's unit text features ``[B, C, D]``."""
        return self._weights(unit_image)

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of one image's class prompts."""
        return [self.layout]
