"""PromptKD: image prompts that learn a teacher's predictions on unlabelled images (Li et al., CVPR 2024; 2403.02781).

``L = w T^2 / (B C) sum KL(softmax(z_t / T) || softmax(z_s / T))``: z_t are the teacher's logits of a view, z_s those of
the student, whose image features (with deep image tokens) are projected into the teacher's space and compared with the
*same* text features. These are computed once. Labels are not looked at. C counts all classes, new ones too, and their
images are trained on as well: results are transductive and say so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Above0, Count, NonNegative, Positive, Template, validated
from vlprompt.methods.registry import register
from vlprompt.methods.taught import TaughtMethod
from vlprompt.objectives.base import Step
from vlprompt.prompts import Projector, VisualPrompts


@validated("settings")
class PromptKDSettings:
    """Settings of PromptKD; 1,013,760 numbers are learned on ViT-B/16 from a ViT-L/14.

    Attributes:
        teacher: The folder of a trained head or run, as a rule PromptSRC's on a larger backbone; or a backbone,
            ``NAME`` or ``NAME:PRETRAINED``, for its zero-shot model; empty for that of the student's own backbone.
        image_tokens: V image tokens.
        image_depth: Layers with image tokens of their own; 3 in cross-data-set runs.
        weight: w; 1000 in the official scripts, 200 on Aircraft, Flowers102 and DTD.
        temperature: T.
        template: The prompt of a zero-shot teacher.
        teacher_dim: E, the width of the teacher's features; 0: the teacher is asked. Heads keep it, so that they can be
            loaded without the teacher.
    """

    teacher: str = ""
    image_tokens: Positive = 4
    image_depth: Positive = 9
    weight: NonNegative = 1000.0
    temperature: Above0 = 1.0
    template: Template = "a photo of a {}."
    teacher_dim: Count = 0


@register("promptkd")
class PromptKD(TaughtMethod):
    """Deep image tokens and a projector into the teacher's space; the teacher's text features are the classifier."""

    Settings = PromptKDSettings
    recipe = RecipeConfig(epochs=20, batch_size=8, lr=0.005)
    learns_image_side = True
    fitted = (*TaughtMethod.fitted, "projector.running_mean", "projector.running_var")
    settings: PromptKDSettings

    def build(self) -> None:
        """Create ``visual`` (``input`` and ``deep``, ``[V, W]`` each) and ``projector`` (D to E); ask the teacher."""
        own, backbone = self.settings, self.backbone
        self.visual = VisualPrompts(backbone.image, own.image_tokens, own.image_depth)
        self.projector = Projector(backbone.embed_dim, self.ask_teacher())

    # -- scoring --------------------------------------------------------------------------------------------------
    def image_features(self, images: Tensor) -> Tensor:
        """Return the student's raw image features ``[B, D]`` with the tokens."""
        return self.backbone.encode_image(images, self.visual.tokens())

    def unit_image(self, features: Tensor) -> Tensor:
        """Return the unit projections ``[B, E]`` of raw ``features`` ``[B, D]``, batch norm as learned."""
        return F.normalize(self.projector(features), dim=-1)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the teacher's unit text features ``[C, E]``."""
        return self.taught_text()[: len(self.class_names)]

    # -- training -------------------------------------------------------------------------------------------------
    def step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return what a step computes; logits are ``[B, A]``, the frozen features the teacher's ``[B, E]``."""
        features, text = self.image_features(inputs), self.taught_text()
        unit = F.normalize(self.projector(features, learn=self.training), dim=-1)
        return Step(labels, features, unit, text, self.score(unit, text), lambda: self.teacher.image_features(inputs))

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the distillation term ``kd``."""
        own = self.settings
        target = self.teacher.logits(step.frozen_features(), step.text_features) / own.temperature
        divergence = F.kl_div(
            (step.logits / own.temperature).log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True
        )
        return {"kd": own.weight * own.temperature**2 * divergence / step.logits.numel()}

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Share the running statistics between processes."""
        self.projector.average()
