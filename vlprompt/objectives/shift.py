"""RESTORE: text and image shift alike, and adapters that keep them from running away together (arXiv 2403.06136)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.config.types import NonNegative, OpenTemplates, Positive, validated
from vlprompt.objectives.base import Host, Objective, Part, Step, Terms, register_objective
from vlprompt.prompts.zero_shot import template_features


@validated("objectives.shift_consistency")
class ShiftConsistencySettings:
    """Settings of the consistency term.

    Attributes:
        weight: Factor of the term (0.5 for DTD in the official scripts, else 1).
        variant: ``code``, the official surrogate: norms of the deep prompts' Gram matrices relative to the first step.
            ``paper``, the paper's definition as this library reads it: relative change of the towers' features against
            the frozen ones, of a hand-written template and of the same images. Published numbers are ``code``'s.
        templates: The frozen prompts that ``paper`` compares with. Left open, the data set's own.
    """

    weight: NonNegative = 1.0
    variant: Literal["code", "paper"] = "code"
    templates: OpenTemplates = ()


def gram_norms(prompts: list[Tensor]) -> Tensor:
    """Return ``||P^T P||_F`` of each layer's prompts ``[M, W]``, computed as the equal ``||P P^T||_F``."""
    return torch.stack([(vectors @ vectors.t()).norm() for vectors in prompts])


@register_objective("shift_consistency")
class ShiftConsistency(Objective):
    """Adds ``weight * sum over layers (text shift - image shift)^2`` (Yaphabates/RESTORE_: maple_fsa.py 347-386).

    The norms of the first step, that shifts are relative to, are saved with a checkpoint; the official code forgets
    them.
    """

    Settings = ShiftConsistencySettings
    settings: ShiftConsistencySettings
    target: Tensor
    text_reference: Tensor
    image_reference: Tensor

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Return that both sides have to learn; for ``code``, deep prompts."""
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
        found = []
        for norms, reference in ((gram_norms(text), self.text_reference), (gram_norms(image), self.image_reference)):
            count = len(reference)
            if not bool(reference.any()):
                reference.copy_(norms[:count].detach())
            found.append(norms[:count] / reference)
        return found[0], found[1]

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the term ``shift``."""
        if self.settings.variant == "code":
            text, image = self.shifts()
        else:
            text = _relative(step.text_features, self.target.expand_as(step.text_features))
            image = _relative(step.unit_image, F.normalize(step.frozen_features(), dim=-1))
        return {**terms, "shift": self.settings.weight * ((text - image) ** 2).sum()}


def feature_shift(host: Host, images: Tensor | None, template: str) -> dict[str, float]:
    """Return how far learnables moved the features: relative changes of text and image features, and their difference.

    ``text``: the norm of the change of all class weights against the frozen features of ``template``, over the norm of
    these; ``image``: the same of the features of ``images`` ``[B, 3, H, W]``, 0 without images; ``gap``: text minus
    image. The paper's diagnostic (arXiv 2403.06136) as this library reads it: at the towers' outputs, unit length.
    """
    with torch.no_grad():
        frozen_text, image, features = template_features(host.backbone, host.class_names, [template]), 0.0, None
        if images is not None:
            features = host.image_features(images)
            frozen = F.normalize(host.backbone.encode_image(images), dim=-1)
            image = float(_relative(host.unit_image(features), frozen))
        weights = host.text_features(None if host.text_features_per == "class" else features)
        text = float(_relative(weights, frozen_text.expand_as(weights)))
    return {"text": text, "image": image, "gap": text - image}


def _relative(features: Tensor, frozen: Tensor) -> Tensor:
    shift: Tensor = (features - frozen).norm() / frozen.norm()
    return shift


@validated("objectives.surgery")
class SurgerySettings:
    """Settings of the surgery adapters.

    Attributes:
        text_ratio: r_t, how much of the adapter enters text features.
        image_ratio: r_v, the same for image features.
        text_gain: What the text ratio gains, per unit of the prompts' Gram norms, when a third of the epochs is over.
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

    At the end of epoch E // 3 (from 0) both ratios grow once by their gain times the mean Gram norm of the deep
    prompts; a method without deep prompts keeps them.
    """

    Settings = SurgerySettings
    kept = ("text_strength", "image_strength")
    settings: SurgerySettings
    text_strength: Tensor
    image_strength: Tensor

    def build(self, host: Host) -> None:
        """Create both adapters, and the ratios as buffers that are saved."""
        width, own = host.backbone.embed_dim, self.settings
        self.text, self.image = _Adapter(width, own.expansion), _Adapter(width, own.expansion)
        self.register_buffer("text_strength", torch.tensor(own.text_ratio))
        self.register_buffer("image_strength", torch.tensor(own.image_ratio))

    def adapt_text(self, features: Tensor) -> Tensor:
        """Return corrected raw text features ``[..., D]``."""
        adapted: Tensor = features + self.text_strength * self.text(features)
        return adapted

    def adapt_image(self, features: Tensor) -> Tensor:
        """Return corrected raw image features ``[B, D]``."""
        adapted: Tensor = features + self.image_strength * self.image(features)
        return adapted

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Raise the ratios once."""
        if epoch != epochs // 3:
            return
        with torch.no_grad():
            text, image = self.host.deep_prompts()
            if text and image:
                self.text_strength += self.settings.text_gain * gram_norms(text).mean()
                self.image_strength += self.settings.image_gain * gram_norms(image).mean()
