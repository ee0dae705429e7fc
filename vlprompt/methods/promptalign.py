"""PromptAlign: TPT of both towers, with tokens drawn to those of source images (Abdul Samadh et al., NeurIPS 2023).

The initial prompts are those of a MaPLe head. All of them are tuned for every image: the loss is TPT's entropy over the
most confident views, plus the distance of their token statistics from those of the images used to train the prompts
(arXiv 2311.01459; :mod:`vlprompt.testtime.alignment`). The published loop omits the last of the ``alignment_depth``
layers but divides by all of them; this implementation does the same. The published statistics are files computed from
ImageNet's images (jameelhassan/PromptAlign, trainers/prompt_align.py 582-583), which ``data.statistics`` reads; without
them, :meth:`PromptAlign.measure_source` computes the statistics from the images that the prompts were trained on, under
the test transform. The head saves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlprompt._finite import check_finite
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, NonNegative, Positive, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.episodic import TunedMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs, TestViews
from vlprompt.prompts import CoupledPrompts
from vlprompt.prompts.context import ContextLength
from vlprompt.prompts.deep import unused_words
from vlprompt.testtime.alignment import CoupledTuner, aligned_layers, as_buffers, coupled_tokens, token_statistics
from vlprompt.testtime.selection import ViewFraction, gather_views, most_confident


@validated("settings")
class PromptAlignSettings:
    """Settings of PromptAlign; the first three are those of the initial MaPLe head.

    Attributes:
        context_length: M text vectors and image tokens.
        context_init: Initial words.
        depth: J layers of both towers.
        lr: AdamW's step size; published: 0.04 for ImageNet's variants, 0.0005 for fine-grained data sets.
        steps: Steps per image; 0 for no adaptation.
        confidence: Fraction of the views that is kept, those with the lowest entropy.
        alignment_weight: Weight of the distance of token statistics; 0 is TPT on MaPLe.
        alignment_depth: Divisor of the weight, one more than the number of aligned layers.
        crops: Random crops of each image in addition to the test view.
        augmix: Mix the crops with AugMix; the published code never does.
        images_at_once: Images that are tuned together. More images need more memory; the result is the same.
    """

    context_length: ContextLength = 2
    context_init: str = "a photo of a"
    depth: Positive = 3
    lr: NonNegative = 0.04
    steps: Count = 1
    confidence: ViewFraction = 0.1
    alignment_weight: NonNegative = 100.0
    alignment_depth: Positive = 3
    crops: Count = 63
    augmix: bool = False
    images_at_once: Positive = 4

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off = unused_words(self.context_length)
        if not self.crops:
            off |= switched_off("settings.crops is 0", "augmix", "confidence")
        if not self.steps:
            off |= switched_off("settings.steps is 0", "lr", "confidence", "alignment_weight", "alignment_depth")
        elif not self.alignment_weight:
            off |= switched_off("settings.alignment_weight is 0", "alignment_depth")
        return off


@register("promptalign")
class PromptAlign(TunedMethod):
    """Coupled prompts of both towers, tuned for every test image."""

    checked = "equations"
    starts_from = "maple"
    Settings = PromptAlignSettings
    settings: PromptAlignSettings
    source_mean: Tensor
    source_variance: Tensor

    @property
    def needs(self) -> Needs:
        """Crops of each test image, as images, and gradients."""
        settings = self.settings
        return Needs("images", "transformers", test_views=TestViews(settings.crops, settings.augmix), gradient=True)

    def build(self) -> None:
        """Create MaPLe's ``prompts``, ``source_mean`` and ``source_variance`` ``[L, T, W]`` as buffers."""
        settings, text = self.settings, self.backbone.text
        self.prompts = CoupledPrompts(
            text, self.backbone.image, settings.context_length, settings.context_init, settings.depth
        )
        self.layout = self.prompts.context.layout(text, self.class_names)
        self._prompt_names = as_buffers(self.prompts)
        for name in ("source_mean", "source_variance"):
            self.register_buffer(name, torch.zeros(0, 0, 0), persistent=False)
        self.fitted = (*(f"prompts.{name}" for name in self._prompt_names), "source_mean", "source_variance")

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the initial tokens."""
        return self.backbone.encode_image(images, self.prompts.tokens())

    def initial_text_features(self) -> Tensor:
        """Return the initial unit text features ``[C, D]``."""
        text, context = self.backbone.text, self.prompts.context
        return self.once("start", lambda: self.unit_text(text.encode(self.layout, context.ctx, context.layers())[0]))

    @property
    def aligns(self) -> bool:
        """Whether tokens are aligned with the source statistics."""
        return bool(self.settings.steps and self._layers())

    @property
    def wants_source(self) -> bool:
        """Whether alignment is enabled and the source statistics are missing."""
        return self.aligns and not self.source_mean.numel()

    def source_shape(self) -> tuple[int, int, int]:
        """Return the number of aligned layers, of tokens (class, patches and prompts), and their width."""
        positions, width = self.backbone.image.visual.positional_embedding.shape
        return self._layers(), int(positions) + self.settings.context_length, int(width)

    def set_source(self, mean: Tensor, variance: Tensor) -> None:
        """Set the source statistics ``[L, T, W]``, which belong to the initial prompts.

        Raises:
            NotFiniteError: They are not finite.
        """
        fix = "Compute in full precision: --backbone.precision fp32"
        check_finite({"mean": mean, "variance": variance}, "the source statistics", fix)
        device = self.backbone.device
        self.source_mean, self.source_variance = mean.to(device), variance.to(device)

    def measure_source(self, batches: Iterable[Tensor]) -> None:
        """Compute the source statistics from normalised images ``[B, 3, H, W]`` with the initial prompts.

        Images are not read if no layer is aligned or statistics are available.
        """
        if not self.wants_source:
            return
        tower = self.backbone.image
        if layers := aligned_layers(tower, self.settings.alignment_depth):
            moved = (images.to(self.backbone.device) for images in batches)
            self.set_source(*token_statistics(tower, moved, self.prompts.tokens(), layers))

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Set the initial prompts from a MaPLe head, or from a PromptAlign head with its statistics."""
        empty = torch.zeros(0, 0, 0)  # statistics are valid only for the prompts they were measured with
        given = {name: value for name, value in state.items() if not name.startswith("objectives.")}
        self.load_trained_state({"source_mean": empty, "source_variance": empty, **given})

    @torch.inference_mode(False)
    def adapt(self, views: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of B images, each tuned separately on its views ``[B, V, 3, H, W]``.

        Raises:
            ConfigError: The input is features, or alignment is enabled without source statistics.
        """
        settings, views = self.settings, views.detach().clone()
        if views.ndim != 5:
            raise ConfigError(f"{self.name} tunes the image tower and needs images [B, V, 3, H, W], not their features")
        if self.wants_source:
            why = "no source statistics: call measure_source(images) first, or set settings.alignment_weight to 0"
            raise ConfigError(f"{self.name} has {why}")
        with torch.no_grad():
            logits = self.backbone.logit_scale * self.unit_views(views) @ self.initial_text_features().t()
            if not settings.steps or not len(views):
                return logits[:, 0]
            chosen = gather_views(views, most_confident(logits, settings.confidence))
        start = {name: self.prompts.get_buffer(name) for name in self._prompt_names}
        weight = settings.alignment_weight / settings.alignment_depth
        tuner = CoupledTuner(self._scored, self.backbone.image, settings.lr, settings.steps, weight, self._layers())
        source = self.source_mean, self.source_variance
        return tuner.tune_in_parts(start, views[:, 0], chosen, source, settings.images_at_once)

    def _layers(self) -> int:
        depth = self.settings.alignment_depth if self.settings.alignment_weight else 0
        return aligned_layers(self.backbone.image, depth)

    def _scored(self, values: Mapping[str, Tensor], images: Tensor, count: int) -> Tensor:
        """Return logits ``[b, n, C]`` of ``images`` ``[b * n, 3, H, W]``, n per image, with each image's prompts."""
        context, deep, tokens = coupled_tokens(values, count)
        features = self.unit_image(self.backbone.encode_image(images, tokens))
        text = self.unit_text(self.backbone.text.encode(self.layout, context, deep))
        return self.backbone.logit_scale * features.reshape(len(text), count, -1) @ text.transpose(1, 2)
