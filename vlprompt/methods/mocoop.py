"""MoCoOp: a mixture of soft prompts with a router (arXiv 2409.12011; official code: dyabel/mocoop; seed_methods 1).

Templates come in semantic groups. Each group has an expert: context vectors started from the group's first template. A
linear router on the image feature picks the top experts; an image's class weights are the gate-weighted sum of their
unit text features. The loss is cross-entropy, plus text supervision of each expert by its group's hand-written
prototypes, plus supervision of the router by the image's affinity to those prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbone import TokenLayout
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import NonNegative, Positive, Templates, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.mixture import PromptMixture
from vlprompt.methods.registry import register
from vlprompt.objectives import Step, routing_loss, routing_target, text_to_text_loss
from vlprompt.prompts import ExpertContexts, TunedLayerNorms, template_layout


@validated("settings")
class MoCoOpSettings:
    """Settings of MoCoOp; the defaults are the official code's, the templates those of its common groups.

    Attributes:
        templates: Hand-written templates, group by group; final periods are ignored.
        groups: Sizes of the groups, in order; they add up to the number of templates.
        top_k: Experts per image.
        text_loss_weight: Weight of the text-to-text term (its temperature is ``text_temperature``).
        gate_loss_weight: Weight of the router's supervision.
        text_correction: Learn one vector ``w`` that is added to all text features of the experts.
        tune_layer_norms: Train the image blocks' layer norms, at ``layer_norm_lr_factor`` times the learning rate.
        text_temperature: 1 as in the official code, or 100 as in LASP.
        context_counting: "words", the official rule, or "tokens", which never touches name, period or end-of-text.
        drop_unused_experts: Give experts that no image of the batch selects zero features, in both text branches. The
            official code does so at batch sizes below 4.
    """

    templates: Templates = (
        "a photo of a {}.",
        "a photo of many {}.",
        "a low resolution photo of the {}.",
        "a low resolution photo of a {}.",
        "a pixelated photo of the {}.",
        "a pixelated photo of a {}.",
        "a good photo of the {}.",
        "a good photo of a {}.",
    )
    groups: tuple[Positive, ...] = (1, 1, 4, 2)
    top_k: Positive = 2
    text_loss_weight: NonNegative = 5.0
    gate_loss_weight: NonNegative = 1.0
    text_correction: bool = True
    tune_layer_norms: bool = True
    layer_norm_lr_factor: NonNegative = 0.1
    text_temperature: NonNegative = 1.0
    context_counting: Literal["words", "tokens"] = "words"
    drop_unused_experts: bool = False

    def __post_init__(self) -> None:
        problems = []
        if sum(self.groups) != len(self.templates):
            problems.append(
                f"settings.groups {list(self.groups)} adds up to {sum(self.groups)}, "
                f"but settings.templates holds {len(self.templates)}"
            )
        if self.top_k > len(self.groups):
            count = len(self.groups)
            problems.append(f"settings.top_k is {self.top_k}; accepted: 1 to {count}, the number of settings.groups")
        if problems:
            raise ConfigError("\n".join(problems))


@register("mocoop")
class MoCoOp(PromptMixture):
    """G experts, a router, and what they are supervised with."""

    Settings = MoCoOpSettings
    recipe = RecipeConfig(epochs=25, lr=0.032, warmup_epochs=3, gradient_clip=1.0)
    settings: MoCoOpSettings
    _prototypes: Tensor | None

    def build(self) -> None:
        """Create experts, ``gate`` (D to G), ``w`` ``[1, D]`` and copies of the image layer norms."""
        own, text, dim = self.settings, self.backbone.text, self.backbone.embed_dim
        templates = [template.replace(".", "") for template in own.templates]
        first = [templates[sum(own.groups[:g])] for g in range(len(own.groups))]
        self.experts = ExpertContexts(text, first, own.context_counting)
        self.gate = nn.Linear(dim, len(own.groups))
        self.w = nn.Parameter(torch.zeros(1, dim)) if own.text_correction else None
        self.norms = TunedLayerNorms(self.backbone.image) if own.tune_layer_norms else None
        self.learns_image_side = own.tune_layer_norms
        self.layout = self.experts.layout(text, self.class_names, period=False)
        # Virtual classes: on a base split the text term covers new names too, in prompts that end in a period.
        self.virtual = self.all_class_names != self.class_names
        if self.virtual:
            self.virtual_layout = self.experts.layout(text, self.all_class_names, period=True)
        self.hard_templates = [template + "." for template in templates]
        self.register_buffer("_prototypes", None, persistent=False)

    @property
    def prototypes(self) -> Tensor:
        """Frozen unit prototypes ``[G, C_all, D]`` of the groups' hand-written templates; only training needs them."""
        if self._prototypes is None:
            layout = template_layout(self.backbone.text, self.all_class_names, self.hard_templates)
            autocast = torch.autocast(self.backbone.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), autocast:  # kept for training, whoever asks first
                features = F.normalize(self.backbone.text.encode(layout), dim=-1).split(list(self.settings.groups))
                self._prototypes = torch.stack([F.normalize(group.mean(dim=0), dim=-1) for group in features])
        return self._prototypes

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]``, through the tuned layer norms where there are any."""
        return self.backbone.image.encode(images, overrides=self.image_overrides() or None)

    def image_overrides(self) -> dict[str, Tensor]:
        """Return the tuned layer norms by their open_clip names."""
        return self.norms.overrides() if self.norms else {}

    # -- training -----------------------------------------------------------------------------------------------
    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``text`` and ``gate``, weighted; a weight of zero leaves its term out."""
        own, terms = self.settings, super().terms(step)
        routing, gates = self.route(step.unit_image)
        if own.text_loss_weight:
            whole = step.text_features
            if self.virtual:
                whole = self.expert_text_features(self._used(gates), virtual=True)
            terms["text"] = own.text_loss_weight * text_to_text_loss(whole, self.prototypes, own.text_temperature)
        if own.gate_loss_weight:
            affinity = torch.einsum("bd,gbd->bg", step.unit_image, self.prototypes[:, step.labels])
            terms["gate"] = own.gate_loss_weight * routing_loss(routing, routing_target(affinity, own.top_k))
        return terms

    def training_layouts(self) -> list[TokenLayout]:
        """Return the experts' layout and, with virtual classes, the text term's."""
        return [self.layout, self.virtual_layout] if self.virtual and self.settings.text_loss_weight else [self.layout]

    def rate_factors(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the layer norms, with their smaller rate, and the decomposition's."""
        norms = list(self.norms.parameters()) if self.norms else []
        return [(norms, self.settings.layer_norm_lr_factor), *super().rate_factors()]
