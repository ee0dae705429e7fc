"""MoCoOp: a mixture of soft prompts with a router (arXiv 2409.12011; official code: dyabel/mocoop).

Templates form semantic groups. Each group has an expert: context vectors initialised from the group's first template.
A linear router on the image feature selects the top experts; an image's classifier is the gate-weighted sum of their
unit text features. The loss is cross-entropy, plus text supervision of each expert by its group's hand-written
prototypes, plus supervision of the router by the image's affinity to these prototypes.

In base-to-new, the router's supervision follows the paper where the released code does not: there, prototypes are in
the order of ``list(set(names))`` (datasets/food101.py 47; prompting/moe.py 214-215, 380-383) and are selected by base
labels (moe.py 511). Each image is compared with the prototypes of some other class, which changes with each start of
Python.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._dist import sum_over_processes
from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.texts import has_references, weighted
from vlprompt.config.types import NonNegative, Positive, Templates, Texts, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.objectives.base import Step
from vlprompt.objectives.grouped_text import text_to_text_loss
from vlprompt.prompts import ExpertContexts, TunedLayerNorms
from vlprompt.prompts.zero_shot import group_features, plain_template


@validated("settings")
class MoCoOpSettings:
    """Settings of MoCoOp; the defaults are those of the official code, with the templates of its common groups.

    Attributes:
        templates: Hand-written templates in the order of the groups; final periods are ignored. The first of a group
            is a template; others may be sentences of classes, of which a file counts as one template.
        groups: Sizes of the groups, in order; they add up to the number of templates.
        top_k: Experts per image.
        text_loss_weight: Weight of the text-to-text term (its temperature is ``text_temperature``).
        gate_loss_weight: Weight of the router's supervision.
        text_correction: Train a vector ``w`` that is added to all text features of the experts.
        tune_layer_norms: Train the image blocks' layer norms, at ``layer_norm_lr_factor`` times the learning rate.
        text_temperature: 1 as in the official code, or 100 as in LASP.
        context_counting: "words", the official rule, or "tokens", which never replaces name, period or end-of-text.
        drop_unused_experts: Use zero features for experts that no image of the batch selects, in both text branches, as
            the official code at batch sizes below 4.
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
        if sum(self.groups) != len(self.templates) and not has_references(self.templates):
            problems.append(
                f"settings.groups {list(self.groups)} adds up to {sum(self.groups)}, "
                f"but settings.templates holds {len(self.templates)}"
            )
        if self.top_k > len(self.groups):
            count = len(self.groups)
            problems.append(f"settings.top_k is {self.top_k}; accepted: 1 to {count}, the number of settings.groups")
        if problems:
            raise ConfigError("\n".join(problems))

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off: dict[str, str] = {}
        if not self.text_loss_weight:
            off |= switched_off("settings.text_loss_weight is 0", "text_temperature")
        if not self.tune_layer_norms:
            off |= switched_off("settings.tune_layer_norms is false", "layer_norm_lr_factor")
        return off


@register("mocoop")
class MoCoOp(PromptMethod):
    """G expert prompts, a router, and the prototypes for their supervision."""

    Settings = MoCoOpSettings
    recipe = RecipeConfig(epochs=25, lr=0.032, warmup_epochs=3, gradient_clip=1.0)
    text_features_per = "expert"
    settings: MoCoOpSettings
    _prototypes: Tensor | None

    @property
    def needs(self) -> Needs:
        """Images, if layer norms of the image tower are tuned."""
        return Needs(inputs="images" if self.settings.tune_layer_norms else "features", towers="transformers")

    def build(self) -> None:
        """Create experts, ``gate`` (D to G), ``w`` ``[1, D]`` and copies of the image layer norms."""
        settings, text, dim = self.settings, self.backbone.text, self.backbone.embed_dim
        starts = [sum(settings.groups[:g]) for g in range(len(settings.groups))]
        first = [_bare(plain_template(settings.templates[start], "settings.templates")) for start in starts]
        self.experts = ExpertContexts(text, first, settings.context_counting)
        self.gate = nn.Linear(dim, len(settings.groups))
        self.w = nn.Parameter(torch.zeros(1, dim)) if settings.text_correction else None
        self.norms = TunedLayerNorms(self.backbone.image) if settings.tune_layer_norms else None
        self.layout = self.experts.layout(text, self.class_names, period=False)
        # Virtual classes: on a base split the text term also covers new names, in prompts with a final period.
        self.virtual = self.all_class_names != self.class_names
        if self.virtual:
            self.virtual_layout = self.experts.layout(text, self.all_class_names, period=True)
        self.register_buffer("_prototypes", None, persistent=False)

    @property
    def prototypes(self) -> Tensor:
        """Frozen unit prototypes ``[G, C_all, D]`` of the groups' hand-written templates; only training needs them."""
        if self._prototypes is None:
            hard = [_with_period(entry) for entry in self.settings.templates]
            self._prototypes = group_features(self.backbone, self.all_class_names, hard, self.settings.groups)
        return self._prototypes

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]``, with the tuned layer norms, if any."""
        return self.backbone.image.encode(images, overrides=self.image_overrides() or None)

    def image_overrides(self) -> dict[str, Tensor]:
        """Return the tuned layer norms by their open_clip names."""
        return self.norms.overrides() if self.norms else {}

    # -- scoring --------------------------------------------------------------------------------------------------
    def expert_text_features(self, used: Tensor | None = None, *, virtual: bool = False) -> Tensor:
        """Return unit text features ``[G, C, D]`` of the experts' prompts, ``w`` added before normalisation.

        Args:
            used: ``[G]`` booleans: unused experts are not encoded and have zero features; None: all are encoded.
            virtual: Use all classes of the data set, in prompts with a final period.
        """
        layout = self.virtual_layout if virtual else self.layout
        if used is None or bool(used.all()):
            return self.once(f"virtual {virtual}", lambda: self._encode(layout, self.experts.vectors()))
        chosen = used.nonzero().squeeze(1)
        # Selected by index: unused experts get a gradient of zero.
        encoded = self._encode(layout.select_groups(chosen.tolist()), self.experts.vectors().index_select(0, chosen))
        return encoded.new_zeros(len(used), *encoded.shape[1:]).index_copy(0, chosen, encoded)

    def _encode(self, layout: TokenLayout, vectors: Tensor) -> Tensor:
        features = self.encode_text(layout, vectors)
        return self.unit_text(features if self.w is None else features + self.w)

    def route(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return routing logits and gates, both ``[B, G]``: gates are a softmax over the top experts, else zero."""
        logits = self.gate(unit)
        top, chosen = logits.topk(self.settings.top_k, dim=-1)
        return logits, torch.zeros_like(logits).scatter(-1, chosen, top.softmax(dim=-1).to(logits.dtype))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the mixtures ``[B, C, D]`` of raw image ``features`` ``[B, D]``: the exact classifier of each image.

        Without features, return the mean expert ``[C, D]``, an approximation for code that takes only one matrix, and
        warn. Mixtures are sums of unit vectors and are not normalised again (official code).
        """
        if features is None:
            warnings.warn(
                "a mixture of prompts has class weights per image; text_features(features) gives them exactly "
                "[B, C, D], this [C, D] is the mean of the experts",
                stacklevel=2,
            )
            return F.normalize(self.expert_text_features().mean(dim=0), dim=-1)
        gates = self.route(self.unit_image(features))[1]
        return torch.einsum("bg,gcd->bcd", gates, self.expert_text_features())

    def logits(self, features: Tensor) -> Tensor:
        """Return ``[B, C]``: the gate-weighted sum of the experts' logits for raw ``features`` ``[B, D]``."""
        unit = self.unit_image(features)
        return self._mix(unit, self.route(unit)[1], self.expert_text_features())

    def _mix(self, unit: Tensor, gates: Tensor, expert_text_features: Tensor) -> Tensor:
        # <v, sum_g a_g t_gc> = sum_g a_g <v, t_gc>: no [B, C, D] mixture is formed.
        cosines = torch.einsum("bd,gcd->bgc", unit, expert_text_features)
        return self.backbone.logit_scale * torch.einsum("bg,bgc->bc", gates, cosines)

    # -- training -----------------------------------------------------------------------------------------------
    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the experts' unit features ``[G, C, D]``; zero for unused experts."""
        return self.expert_text_features(self._used(self.route(unit_image)[1]))

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the mixed logits ``[B, C]``."""
        return self._mix(unit_image, self.route(unit_image)[1], weights)

    def _used(self, gates: Tensor) -> Tensor | None:
        return _by_any_process((gates > 0).any(dim=0)) if self.settings.drop_unused_experts else None

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``text`` and ``gate``, weighted; a weight of zero omits the term."""
        settings, terms = self.settings, super().terms(step)
        routing, gates = self.route(step.unit_image)
        if settings.text_loss_weight:
            text_features = step.text_features
            if self.virtual:
                text_features = self.expert_text_features(self._used(gates), virtual=True)
            terms["text"] = settings.text_loss_weight * text_to_text_loss(
                text_features, self.prototypes, settings.text_temperature
            )
        if settings.gate_loss_weight:
            affinity = torch.einsum("bd,gbd->bg", step.unit_image, self.prototypes[:, step.labels])
            terms["gate"] = settings.gate_loss_weight * routing_loss(routing, routing_target(affinity, settings.top_k))
        return terms

    def training_layouts(self) -> list[TokenLayout]:
        """Return the experts' layout and, with virtual classes, the text term's."""
        return [self.layout, self.virtual_layout] if self.virtual and self.settings.text_loss_weight else [self.layout]

    def rate_factors(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the layer norms, with their smaller rate, and the decomposition's."""
        norms = list(self.norms.parameters()) if self.norms else []
        return [(norms, self.settings.layer_norm_lr_factor), *super().rate_factors()]


def _bare(template: str) -> str:
    return template.replace(".", "")


def _with_period(entry: Texts) -> Texts:
    """Return a template with one period, at its end; sentences of classes are unchanged."""
    body, weight = weighted(entry)
    if not isinstance(body, str):
        return entry
    return _bare(body) + "." if weight is None else (_bare(body) + ".", weight)


def _by_any_process(used: Tensor) -> Tensor:
    """Return ``used`` ``[G]`` over the global batch of all processes."""
    return sum_over_processes(used.int()) > 0


ROUTING_BOOST = 10.0
"""Added to the best affinities before the routing target's softmax (MoCoOp: prompting/moe.py 110-127)."""


def routing_target(affinity: Tensor, top_k: int) -> Tensor:
    """Return soft routing targets ``[B, G]``: softmax of ``affinity`` with the ``top_k`` largest raised by ten.

    Args:
        affinity: ``[B, G]`` cosines between each image and its label's prototype in each group. The target is not
            detached: its gradient reaches the image side, as in the official code.
        top_k: Number of experts per image.
    """
    best = affinity.topk(top_k, dim=-1).indices
    return (affinity + torch.zeros_like(affinity).scatter(-1, best, ROUTING_BOOST)).softmax(dim=-1)


def routing_loss(routing_logits: Tensor, target: Tensor) -> Tensor:
    """Return the soft cross-entropy of routing logits ``[B, G]`` over all experts with ``target`` ``[B, G]``."""
    return F.cross_entropy(routing_logits, target)
