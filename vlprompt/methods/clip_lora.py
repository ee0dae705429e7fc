"""CLIP-LoRA: low-rank updates of the attention in both towers (Zanella and Ben Ayed, CVPR-W 2024; arXiv 2405.18541).

Every selected projection becomes ``y = W x + b + s B A dropout(x)`` with ``s = alpha / sqrt(r)`` (the official code,
MaxZanella/CLIP-LoRA: not LoRA's ``alpha / r``). B starts at zero, so training starts from zero-shot CLIP. All data sets
have the same hyperparameters. Scores are cosines times the backbone's temperature, which is the official
constant 100 for OpenAI's weights. Trained by cross-entropy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Above0, Below1, Count, Ge, Le, MinLen, OpenTemplates, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.objectives.base import Step
from vlprompt.prompts import LowRank
from vlprompt.prompts.zero_shot import first_layout, first_texts, template_features

#: First block of each position, and the block after its last, of 12 (MaxZanella/CLIP-LoRA 358f0d7: loralib/utils.py).
POSITIONS = {
    "all": (0, 12),
    "bottom": (0, 4),
    "mid": (4, 8),
    "up": (8, 12),
    "half-bottom": (0, 6),
    "half-up": (6, 12),
    "top3": (9, 12),
}


@validated("settings")
class CLIPLoRASettings:
    """Settings of CLIP-LoRA; the defaults are the paper's (184,320 numbers on ViT-B/16).

    Attributes:
        encoder: Towers with updates. A tower without updates is frozen, and its features are computed once.
        position: Blocks with updates: all, a third (bottom, mid, up), a half (half-bottom, half-up) or the last
            quarter (top3). These are the published block indices of a tower of 12, so a tower of fewer blocks has
            fewer of them or none; a deeper tower is divided likewise (half-up of 24 are blocks 12 to 23).
        layers: Block indices from 0, used instead of a position; indices that a tower does not have are ignored.
        params: Attention projections with updates, of q, k, v and o (the output).
        rank: r.
        alpha: The update is scaled by alpha / sqrt(r).
        dropout: Fraction of an update's input that a training step drops, drawn for each projection.
        templates: Prompts with {} for the class name. A text tower with updates uses the first; a frozen text tower
            averages the unit features of all, also in evaluation (where the official code uses the first).
        logit_scale: Factor of the cosines; null for the backbone's logit scale.
    """

    encoder: Literal["both", "vision", "text"] = "both"
    position: Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top3"] = "all"
    layers: tuple[Count, ...] = ()
    params: Annotated[tuple[Literal["q", "k", "v", "o"], ...], MinLen(1)] = ("q", "k", "v")
    rank: Annotated[int, Ge(1), Le(4096)] = 2
    alpha: float = 1.0
    dropout: Below1 = 0.25
    templates: OpenTemplates = ()
    logit_scale: Above0 | None = None

    def __post_init__(self) -> None:
        repeated = [name for name in ("layers", "params") if len(set(getattr(self, name))) < len(getattr(self, name))]
        if repeated:
            raise ConfigError(
                "\n".join(f"settings.{name} is {list(getattr(self, name))}; accepted: each once" for name in repeated)
            )

    def blocks(self, depth: int) -> list[int]:
        """Return the blocks with updates, for a tower of ``depth`` blocks."""
        first, end = (max(depth, 12) * bound // 12 for bound in POSITIONS[self.position])
        return [block for block in self.layers or range(first, end) if block < depth]

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return switched_off(f"settings.layers is {list(self.layers)}", "position") if self.layers else {}


@register("clip_lora")
class CLIPLoRA(PromptMethod):
    """Low-rank updates of attention projections, trained by cross-entropy."""

    Settings = CLIPLoRASettings
    recipe = RecipeConfig(
        steps=8000,
        drop_last=False,
        lr=0.0002,
        optimizer="adamw",
        weight_decay=0.01,
        schedule="step",
        final_lr=1e-6,
        warmup_epochs=0,
    )
    settings: CLIPLoRASettings

    @property
    def needs(self) -> Needs:
        """Images, unless only the text tower has updates."""
        return Needs() if self.settings.encoder == "text" else Needs(inputs="images", towers="transformers")

    def build(self) -> None:
        """Create ``base_model``: per projection ``lora_A.weight`` ``[r, W]`` and ``lora_B.weight`` ``[W, r]``.

        Raises:
            ConfigError: No block of any chosen tower has updates.
        """
        settings, image, text = self.settings, self.backbone.image, self.backbone.text
        self.base_model = LowRank(settings.rank, settings.alpha / settings.rank**0.5, settings.dropout)
        if settings.encoder != "text":
            image.require_tokens()
            self.base_model.add("visual.", image.width, settings.blocks(image.layers), settings.params)
        if settings.encoder != "vision":
            self.base_model.add("", text.width, settings.blocks(text.layers), settings.params)
            self.layout = first_layout(text, self.class_names, settings.templates)
        else:
            features = template_features(self.backbone, self.class_names, settings.templates)
            self.register_buffer("frozen_text", features, persistent=False)
        if not list(self.base_model.parameters()):
            depths = {"vision": image.layers, "text": text.layers}
            chosen = [name for name in depths if settings.encoder in (name, "both")]
            said = " or ".join(f"the {name} tower ({depths[name]} blocks)" for name in chosen)
            setting = f"layers is {list(settings.layers)}" if settings.layers else f"position is {settings.position!r}"
            raise ConfigError(f"settings.{setting}, which is no block of {said}; use position all")

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the texts of the classifier: all, or the first if the text tower is changed."""
        templates = self.settings.templates
        frozen = self.settings.encoder == "vision"
        return {"templates": templates if frozen else first_texts(templates)}

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the updates."""
        added = self.base_model.added("visual.") if self.needs.images else None
        return self.backbone.encode_image(images, added=added)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]`` of the template."""
        if self.settings.encoder == "vision":
            return self.unit_text(self.get_buffer("frozen_text"))
        text = self.backbone.text
        added = self.base_model.added("")
        return self.once("classes", lambda: self.unit_text(text.encode(self.layout, added=added)[0]))

    @property
    def cosine_scale(self) -> float | None:
        """The factor of the cosines in the logits."""
        scale = self.settings.logit_scale
        return super().cosine_scale if scale is None else scale

    def score(self, unit_image: Tensor, text_features: Tensor) -> Tensor:
        """Return the logits ``[B, C]``."""
        scale = self.settings.logit_scale
        return (self.backbone.logit_scale if scale is None else scale) * unit_image @ text_features.t()

    def step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return the features and logits of a training step, with dropout in training mode."""
        if not (self.training and self.settings.dropout):
            return super().step(inputs, labels)
        with self.base_model.dropping(inputs.device):
            return super().step(inputs, labels)

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts, if the text tower has updates."""
        return [] if self.settings.encoder == "vision" else [self.layout]

    @property
    def in_towers(self) -> bool:
        """Return True: updates are added to weights."""
        return True

    def image_overrides(self) -> dict[str, Tensor]:
        """Return the image tower's attention weights with the updates merged in."""
        return self.base_model.merged("visual.", self.backbone.image.parameters())

    def text_overrides(self) -> dict[str, Tensor]:
        """Return the text tower's attention weights with the updates merged in."""
        return self.base_model.merged("", self.backbone.text.parameters())
