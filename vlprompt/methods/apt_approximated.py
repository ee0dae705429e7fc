"""APT on CLIP: approximated prompt tuning, a reconstruction (Wu et al., arXiv 2306.15706; official code: ViLT, METER).

Prompts in a sequence change a token's attention to ``(1 - l) Attn(X) + l Attn(P)``, where l is the prompts' share of
the softmax sum. APT instead adds the prompts' contribution to the attention's result x of every block, computed from
the attention's input r without the common sum: ``exp(sigma) (x + w relu(r K^T) M)``, ``K = M + R2 R1 M``,
``w = max relu(r K^T)`` without gradient. The paper has CLIP results, but the official code supports only ViLT and
METER. The module is that of the code for ViLT; its position after every attention of both towers and the sizes are
choices of this library. Trained by cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vlprompt.backbone import Added, TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Ge, Le, OpenTemplates, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import CONTEXT_STD, Diffusion
from vlprompt.prompts.zero_shot import first_layout, first_texts, template_features


@validated("settings")
class APTSettings:
    """Settings of APT; rank and form are those of the official code, the numbers of tokens are this library's.

    Attributes:
        text_tokens: n of every text block; 0 leaves the text tower frozen. The official code has 50 to 200.
        image_tokens: n of every image block; 0 leaves the image tower frozen.
        rank: Rank of the keys' update R2 R1.
        normaliser: ``relu-max``, the method; or ``softmax-lambda``, the attention that it approximates: every token
            also attends to the tokens M, in the same softmax. The latter has only M as parameters.
        zero_init_values: Use separate values, initially zero, in place of M in the product with the affinities, so
            that training starts from zero-shot CLIP. Not in the official code.
        per_head: Compute affinities and maxima for each head's slice of the width. Not in the official code.
        templates: Prompts with {} for the class name. A text tower with tokens uses the first; a frozen text tower uses
            the mean of the unit features of all.
    """

    text_tokens: Annotated[int, Ge(0), Le(4096)] = 16
    image_tokens: Annotated[int, Ge(0), Le(4096)] = 32
    rank: Annotated[int, Ge(1), Le(4096)] = 4
    normaliser: Literal["relu-max", "softmax-lambda"] = "relu-max"
    zero_init_values: bool = False
    per_head: bool = False
    templates: OpenTemplates = ()

    def __post_init__(self) -> None:
        problems = []
        if not self.text_tokens and not self.image_tokens:
            problems.append("settings.text_tokens and settings.image_tokens are both 0; accepted: one of them above 0")
        if self.normaliser == "softmax-lambda" and (self.zero_init_values or self.per_head):
            problems.append(
                "settings.zero_init_values and settings.per_head are variants of normaliser relu-max; set them to "
                "false with softmax-lambda, which has the attention's own heads and values"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        softmax = self.normaliser == "softmax-lambda"
        return switched_off("settings.normaliser is 'softmax-lambda', which has no keys", "rank") if softmax else {}


class Tokens(nn.Module):
    """Tokens ``[n, W]`` of one block, deviation 0.02."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width) * CONTEXT_STD)


@register("apt_approximated")
class APT(PromptMethod):
    """Prompt tokens after every attention of both towers."""

    checked = "reconstruction"
    Settings = APTSettings
    recipe = RecipeConfig(lr=0.0005, optimizer="adamw", weight_decay=0.01)
    settings: APTSettings

    @property
    def needs(self) -> Needs:
        """Images, unless the image side is not trained."""
        return Needs(inputs="images", towers="transformers") if self.settings.image_tokens else Needs()

    def build(self) -> None:
        """Create ``text`` and ``image``, a :class:`Diffusion` for every block of each tower."""
        settings, image, text = self.settings, self.backbone.image, self.backbone.text
        self.image = self.text = None
        if settings.image_tokens:
            image.require_tokens()
            self.image = self._blocks(settings.image_tokens, image.width, image.visual.transformer.resblocks)
        if settings.text_tokens:
            self.text = self._blocks(settings.text_tokens, text.width, text.model.transformer.resblocks)
            self.layout = first_layout(text, self.class_names, settings.templates)
        else:
            features = template_features(self.backbone, self.class_names, settings.templates)
            self.register_buffer("frozen_text", features, persistent=False)

    def _blocks(self, count: int, width: int, blocks: Sequence[Any]) -> nn.ModuleList:
        settings = self.settings
        if settings.normaliser == "softmax-lambda":
            return nn.ModuleList(Tokens(count, width) for _ in blocks)
        heads = [block.attn.num_heads if settings.per_head else 1 for block in blocks]
        return nn.ModuleList(Diffusion(count, width, settings.rank, settings.zero_init_values, each) for each in heads)

    def _added(self, blocks: nn.ModuleList) -> Added:
        if self.settings.normaliser == "softmax-lambda":
            return Added(rows={layer: block.tokens for layer, block in enumerate(blocks) if isinstance(block, Tokens)})
        return Added(after_attention=dict(enumerate(blocks)))

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the texts of the classifier: all, or the first if the text tower is changed."""
        templates = self.settings.templates
        frozen = self.text is None
        return {"templates": templates if frozen else first_texts(templates)}

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the tokens."""
        return self.backbone.encode_image(images, added=self._added(self.image) if self.image is not None else None)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]`` of the template."""
        if self.text is None:
            return self.unit_text(self.get_buffer("frozen_text"))
        text, added = self.backbone.text, self._added(self.text)
        return self.once("classes", lambda: self.unit_text(text.encode(self.layout, added=added)[0]))

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts, if the text tower has tokens."""
        return [] if self.text is None else [self.layout]
