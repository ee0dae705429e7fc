"""Self-regularisation: features and predictions stay near the frozen model's (PromptSRC; Khattak et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.config.types import NonNegative, Templates, validated
from vlprompt.objectives.base import Host, Objective, Part, Step, Terms, register_objective, unit
from vlprompt.prompts.zero_shot import template_features


@validated("objectives.self_regularisation")
class SelfRegularisationSettings:
    """Settings of the three terms; a weight of 0 omits the term.

    Attributes:
        text: Weight of the mean absolute difference of unit text features, over classes and dimensions.
        image: Weight of the same for unit image features, over images and dimensions.
        logits: Weight of the divergence of predictions, summed and divided by images times classes.
        templates: Templates of the frozen text features, averaged before they are normalised; the default is the
            official code's 60.
    """

    text: NonNegative = 25.0
    image: NonNegative = 10.0
    logits: NonNegative = 1.0
    templates: Templates = ENSEMBLES["promptsrc"]

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.text or self.logits else switched_off("text and logits are 0", "templates")


@register_objective("self_regularisation")
class SelfRegularisation(Objective):
    """Adds ``scl_text``, ``scl_image`` and ``scl_logits`` (muzairkhattak/PromptSRC: trainers/promptsrc.py 297-336)."""

    Settings = SelfRegularisationSettings
    settings: SelfRegularisationSettings
    target: Tensor

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Require text features that depend on parameters, unless the text term is omitted."""
        return {"text": "set self_regularisation.text to 0"} if settings.text else {}

    def build(self, host: Host) -> None:
        """Encode the templates once."""
        settings = self.settings
        target = template_features(host.backbone, host.class_names, settings.templates, "raw")
        self.register_buffer("target", target, persistent=False)

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the terms with a weight above 0; the image term only if image features are trained."""
        settings, result = self.settings, dict(terms)
        if settings.text:
            result["scl_text"] = settings.text * (step.text_features - self.target).abs().mean()
        if settings.image and self.host.needs.images:
            result["scl_image"] = settings.image * (step.unit_image - self._frozen(step)).abs().mean()
        if settings.logits:
            with torch.no_grad():
                frozen = (self.host.backbone.logit_scale * self._frozen(step) @ self.target.t()).log_softmax(-1)
            learned = step.logits.log_softmax(-1)
            divergence = F.kl_div(learned, frozen, reduction="sum", log_target=True)
            result["scl_logits"] = settings.logits * divergence / step.logits.numel()
        return result

    def _frozen(self, step: Step) -> Tensor:
        return unit(step.frozen_features())
