"""TPT: context that is tuned on the views of one test image (Shu et al., NeurIPS 2022; arXiv 2209.07511).

The initial context is "a photo of a" or that of a trained CoOp head. For every image separately, the most confident
tenth of its views is selected, one AdamW step reduces the entropy of their mean prediction, and the test view is scored
with the updated context. Context and optimiser are reset for the next image.

The official code runs all classes twice at 77 tokens per image; here the first pass is shared by all images
(:mod:`vlprompt.testtime.tuning`). It keeps ``int(V * confidence)`` views, which may be none; here at least one is kept.
Its loss scaling in half precision, which can skip an image's step, is omitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, NonNegative, Positive, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.episodic import TunedMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs, TestViews
from vlprompt.prompts import TextContext
from vlprompt.prompts.context import ContextLength, generic_context
from vlprompt.testtime.selection import ViewFraction, most_confident
from vlprompt.testtime.tuning import ContextTuner, Tuned, tuned_layout

_NAME = "[CLS]"


@validated("settings")
class TPTSettings:
    """Settings of TPT.

    Attributes:
        context_init: Initial words. ``[CLS]`` marks the position of the class name, by default after the words. Empty:
            normal noise of deviation 0.02, drawn once.
        context_length: M, when no words are given.
        lr: AdamW's step size; its weight decay is 0.01.
        steps: Steps per image; 0 is zero-shot.
        confidence: Fraction of the views that is kept, those with the lowest entropy.
        crops: Random crops of each image in addition to the test view.
        augmix: Mix the crops with AugMix, as published for fine-grained data sets.
        images_at_once: Images whose prompts are encoded together. More images need more memory; the result is the same.
        jacobian: Compute the derivatives of all text features once instead of a backward pass per image. The result is
            the same; it is faster for thousands of images and needs C x D x M x W numbers of memory.
    """

    context_init: str = "a photo of a"
    context_length: ContextLength = 4
    lr: NonNegative = 0.005
    steps: Count = 1
    confidence: ViewFraction = 0.1
    crops: Count = 63
    augmix: bool = False
    images_at_once: Positive = 8
    jacobian: bool = False

    filters: ClassVar[tuple[str, ...]] = ("confidence",)
    """The settings that select views."""

    def __post_init__(self) -> None:
        if self.context_init.split().count(_NAME) > 1 or self.context_init.strip() == _NAME:
            raise ConfigError(f"settings.context_init is {self.context_init!r}; accepted: words, {_NAME} once or never")

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off: dict[str, str] = {}
        if self.context_init:
            reason = f"settings.context_init is {self.context_init!r}, whose words are counted"
            off |= switched_off(reason, "context_length")
        if not self.crops:
            off |= switched_off("settings.crops is 0", "augmix")
        if not self.steps:
            off |= switched_off("settings.steps is 0", "lr", *self.filters)
        elif not self.views_besides():
            off |= switched_off("there is one view of an image", *self.filters)
        return off

    def views_besides(self) -> int:
        """Return the number of views of an image in addition to the test view."""
        return self.crops


@register("tpt")
class TPT(TunedMethod):
    """Context vectors tuned for every test image."""

    Settings = TPTSettings
    settings: TPTSettings
    fitted = ("ctx",)
    ctx: Tensor

    @property
    def needs(self) -> Needs:
        """Crops of each test image, and gradients."""
        return Needs(test_views=TestViews(self.settings.crops, self.settings.augmix), gradient=True)

    def build(self) -> None:
        """Create the buffer ``ctx`` ``[M, W]``, the initial context of every image, and the prompts' layout."""
        settings = self.settings
        words = settings.context_init.split()
        self._name_at = words.index(_NAME) if _NAME in words else None
        rest = settings.context_init if self._name_at is None else " ".join(word for word in words if word != _NAME)
        initial = TextContext(self.backbone.text, settings.context_length, rest)
        self._words = initial.placeholder
        self.own_draws = () if rest else ("the initial context",)
        self.register_buffer("ctx", initial.ctx.detach().clone(), persistent=False)
        self._arrange()

    def _arrange(self) -> None:
        """Create the layout for the current context, and clear cached results."""
        length = len(self.ctx)
        if length != len(self._words.split(" ")):  # context of another head, with a different number of vectors
            self._words, self._name_at = " ".join(["X"] * length), None
        before = length if self._name_at is None else self._name_at
        self.layout = tuned_layout(self.backbone.text, self.class_names, self._words, length, before)
        self._remembered.clear()
        self._derivatives: Tensor | None = None

    @classmethod
    def texts_setting(cls, settings: Any) -> str | None:
        """Return the initial words; random vectors have none."""
        return "context_init" if settings.context_init.strip() else None

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the initial words as a template, ``"a photo of a {}."``; random vectors have none."""
        words = self.settings.context_init.strip()
        if not words:
            return {}
        template = words if self._name_at is None else words.replace(_NAME, "{}")
        return {"templates": [f"{template} {{}}." if self._name_at is None else f"{template}."]}

    def initial_text_features(self) -> Tensor:
        """Return the unit text features ``[C, D]`` of the initial context."""
        return self.once("start", lambda: self._encode(self.layout, self.ctx[None])[0])

    def _encode(self, layout: TokenLayout, context: Tensor) -> Tensor:
        return self.unit_text(self.backbone.text.encode(layout, context))

    def adapt(self, views: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of B images, each tuned separately on its views ``[B, V, D]``."""
        return self.tuned(views).logits

    def tuned(self, views: Tensor) -> Tuned:
        """Return logits, selected views, losses, gradients and contexts of B images."""
        settings, scale = self.settings, self.backbone.logit_scale
        tuner = ContextTuner(self._encode, self.layout, scale, settings.lr, settings.steps, settings.images_at_once)
        with torch.no_grad():
            unit_views = self.unit_views(views)
        if settings.jacobian and self._derivatives is None:
            self._derivatives = tuner.jacobian(self.ctx)
        return tuner.tune(self.ctx, unit_views, self.select, self._derivatives)

    def select(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the views ``[B, n]`` for the loss, from logits ``[B, V, C]`` and unit features ``[B, V, D]``."""
        return most_confident(logits, self.settings.confidence)

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the context; its number of vectors may differ."""
        super().load_trained_state(state)
        self._arrange()

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Set the initial context from another head of TPT, CoOp, KgCoOp or ProGrad.

        Raises:
            HeadError: The head has other tensors, or class-specific context.
        """
        self.load_trained_state({"ctx": generic_context(self.name, state)})
