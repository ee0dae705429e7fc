"""RESTORE: a term for equal shifts of text and image features, and surgery adapters (arXiv 2403.06136)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.config.effect import switched_off
from vlprompt.config.types import NonNegative, OpenTemplates, Positive, validated
from vlprompt.objectives.base import Host, Objective, Part, Step, Terms, register_objective
from vlprompt.prompts.zero_shot import template_features


@validated("objectives.shift_consistency")
class ShiftConsistencySettings:
    """Settings of the consistency term.

    Attributes:
        weight: Factor of the term (0.5 for DTD in the official scripts, else 1).
        variant: ``code``, the official surrogate of the published results: norms of the deep prompts' Gram matrices
            relative to the first step. ``paper``, this library's reading of the paper: relative change of the towers'
            features from the frozen features of a hand-written template and of the same images.
        templates: The frozen prompts of ``paper``. Default: the template of the data set.
    """

    weight: NonNegative = 1.0
    variant: Literal["code", "paper"] = "code"
    templates: OpenTemplates = ()

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        if not self.weight:
            return switched_off("weight is 0", "variant", "templates")
        return switched_off("variant is 'code'", "templates") if self.variant == "code" else {}


def gram_norms(prompts: list[Tensor]) -> Tensor:
    """Return ``||P^T P||_F`` of each layer's prompts ``[M, W]``, computed as the equal ``||P P^T||_F``."""
    return torch.stack([(vectors @ vectors.t()).norm() for vectors in prompts])


@register_objective("shift_consistency")
class ShiftConsistency(Objective):
    """Adds ``weight * sum over layers (text shift - image shift)^2`` (Yaphabates/RESTORE_: maple_fsa.py 347-386).

    Shifts are relative to the norms of the first step, which are saved in checkpoints; the official code does not save
    them.
    """

    Settings = ShiftConsistencySettings
    settings: ShiftConsistencySettings
    target: Tensor
    text_reference: Tensor
    image_reference: Tensor

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Require trained text and image sides; for ``code``, deep prompts in both towers."""
        return {"text": "", "image": ""} if settings.variant == "paper" else {"deep": "use depth 2 or more"}

    def build(self, host: Host) -> None:
        """Create the references, 0 until the first step."""
        layers = host.deep_layers()
        if self.settings.variant == "paper":
            target = template_features(host.backbone, host.class_names, self.settings.templates)
            self.register_buffer("target", target, persistent=False)
        for side in ("text", "image"):
            self.register_buffer(f"{side}_reference", torch.zeros(layers))

    def shifts(self) -> tuple[Tensor, Tensor]:
        """Return the Gram shifts of text and image, one value per deep layer."""
        text, image = self.host.deep_prompts()
        shifts = []
        for norms, reference in ((gram_norms(text), self.text_reference), (gram_norms(image), self.image_reference)):
            count = len(reference)
            if not bool(reference.any()):
                reference.copy_(norms[:count].detach())
            shifts.append(norms[:count] / reference)
        return shifts[0], shifts[1]

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the term ``shift``."""
        if self.settings.variant == "code":
            text, image = self.shifts()
        else:
            text = _relative(step.text_features, self.target.expand_as(step.text_features))
            image = _relative(step.unit_image, F.normalize(step.frozen_features(), dim=-1))
        return {**terms, "shift": self.settings.weight * ((text - image) ** 2).sum()}


def feature_shift(host: Host, images: Tensor | None, template: str) -> dict[str, float]:
    """Return the relative changes of text and image features by training, and their difference.

    ``text``: norm of the change of all text features from the frozen features of ``template``, divided by the norm of
    the latter; ``image``: the same for the features of ``images`` ``[B, 3, H, W]``, 0 without images; ``gap``: text
    minus image. This is the library's reading of the paper's diagnostic (arXiv 2403.06136): unit features of the
    towers' outputs.
    """
    with torch.no_grad():
        frozen_text, image, features = template_features(host.backbone, host.class_names, [template]), 0.0, None
        if images is not None:
            features = host.image_features(images)
            frozen = F.normalize(host.backbone.encode_image(images), dim=-1)
            image = float(_relative(host.unit_image(features), frozen))
        text_features = host.text_features(None if host.text_features_per == "class" else features)
        text = float(_relative(text_features, frozen_text.expand_as(text_features)))
    return {"text": text, "image": image, "gap": text - image}


def _relative(features: Tensor, frozen: Tensor) -> Tensor:
    shift: Tensor = (features - frozen).norm() / frozen.norm()
    return shift


@validated("objectives.surgery")
class SurgerySettings:
    """Settings of the surgery adapters.

    Attributes:
        text_ratio: r_t, the factor of the adapter on text features.
        image_ratio: r_v, the same for image features.
        text_gain: Increase of the text ratio per unit of the prompts' Gram norms, after a third of the epochs.
        image_gain: The same for the image ratio.
        expansion: Width of the adapters' hidden layer in widths of the features.
    """

    text_ratio: NonNegative = 0.1
    image_ratio: NonNegative = 0.1
    text_gain: NonNegative = 0.02
    image_gain: NonNegative = 0.005
    expansion: Positive = 4


class _Adapter(nn.Module):
    def __init__(self, width: int, expansion: Positive) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.up(self.norm(features))
        correction: Tensor = self.down(hidden * torch.sigmoid(1.702 * hidden))
        return correction


@register_objective("surgery")
class Surgery(Objective):
    """Residual adapters on raw features: ``f + r * FFN(LN(f))`` for text and image (maple_fsa.py 141-154, 366-373).

    At the end of epoch E // 3 (from 0) both ratios increase once, by their gain times the mean Gram norm of the deep
    prompts. Without deep prompts they are constant.
    """

    Settings = SurgerySettings
    kept = ("text_strength", "image_strength")
    settings: SurgerySettings
    text_strength: Tensor
    image_strength: Tensor

    def build(self, host: Host) -> None:
        """Create both adapters, and the ratios as saved buffers."""
        width, settings = host.backbone.embed_dim, self.settings
        self.text, self.image = _Adapter(width, settings.expansion), _Adapter(width, settings.expansion)
        self.register_buffer("text_strength", torch.tensor(settings.text_ratio))
        self.register_buffer("image_strength", torch.tensor(settings.image_ratio))

    def adapt_text(self, features: Tensor) -> Tensor:
        """Return corrected raw text features ``[..., D]``."""
        adapted: Tensor = features + self.text_strength * self.text(features)
        return adapted

    def adapt_image(self, features: Tensor) -> Tensor:
        """Return corrected raw image features ``[B, D]``."""
        adapted: Tensor = features + self.image_strength * self.image(features)
        return adapted

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Increase the ratios at the end of epoch E // 3."""
        if epoch != epochs // 3:
            return
        with torch.no_grad():
            text, image = self.host.deep_prompts()
            if text and image:
                self.text_strength += self.settings.text_gain * gram_norms(text).mean()
                self.image_strength += self.settings.image_gain * gram_norms(image).mean()
