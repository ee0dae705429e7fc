"""TDA: caches of confident and of uncertain test images (Karmanov et al., CVPR 2024; arXiv 2403.18293).

Test images are processed in sequence. Each image may be added to a cache of its predicted class, and its zero-shot
logits are corrected by its affinity to the images in both caches (:mod:`vlprompt.testtime.tda`). No gradients. Scores
depend on the order of the test images. The official code shuffles them (kdiAAA/TDA, utils.py 130-139); here ``seed``
draws the order and ``data.order: file`` keeps that of the list. Report several orders: ``--seeds 1,2,3``.

The published cache weights differ by data set and were evidently chosen on the evaluated images; ``configs/tda`` has
them, and the defaults are ImageNet's. The published code multiplies cosines by 100; here the backbone's logit scale is
used, which is 100 for OpenAI's weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, NonNegative, OpenTemplates, Positive, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.episodic import TemplateViewsMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs, TestViews
from vlprompt.testtime.selection import ViewFraction
from vlprompt.testtime.tda import NegativeCache, PositiveCache, Scored, TDAStream, summarise


@validated("settings")
class TDASettings:
    """Settings of TDA.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        positive: Use the cache of predicted classes.
        positive_capacity: Images per class.
        positive_alpha: Weight of its logits.
        positive_beta: Sharpness of its affinities.
        negative: Use the cache of uncertain images.
        negative_capacity: Images per class.
        negative_alpha: Weight of its logits, which are subtracted.
        negative_beta: Sharpness of its affinities.
        negative_entropy: Lower and upper bound of the entropy (nats over log2 of C) for an image to be added.
        negative_mask: Lower and upper bound of the probabilities of classes for which an image is a negative.
        confidence: Fraction of the views that is used, if there are several.
        crops: Random crops of each image in addition to the test view; published: 63 for ImageNet's variants, else 0.
        augmix: Mix the crops with AugMix.
    """

    templates: OpenTemplates = ()
    positive: bool = True
    positive_capacity: Positive = 3
    positive_alpha: NonNegative = 2.0
    positive_beta: NonNegative = 5.0
    negative: bool = True
    negative_capacity: Positive = 2
    negative_alpha: NonNegative = 0.117
    negative_beta: NonNegative = 1.0
    negative_entropy: tuple[float, float] = (0.2, 0.5)
    negative_mask: tuple[float, float] = (0.03, 1.0)
    confidence: ViewFraction = 0.1
    crops: Count = 0
    augmix: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"settings.{name} is {list(bounds)}; accepted: a lower and an upper bound, [0.2, 0.5]"
            for name, bounds in (("negative_entropy", self.negative_entropy), ("negative_mask", self.negative_mask))
            if bounds[0] > bounds[1]
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off: dict[str, str] = {} if self.crops else switched_off("settings.crops is 0", "confidence", "augmix")
        for cache, more in (("positive", ()), ("negative", ("negative_entropy", "negative_mask"))):
            names = (f"{cache}_capacity", f"{cache}_beta", *more)
            if not getattr(self, cache):
                off |= switched_off(f"settings.{cache} is false", f"{cache}_alpha", *names)
            elif not getattr(self, f"{cache}_alpha"):
                off |= switched_off(f"settings.{cache}_alpha is 0", *names)
        return off


@register("tda")
class TDA(TemplateViewsMethod):
    """Two caches for a stream of test images."""

    Settings = TDASettings
    settings: TDASettings

    @property
    def needs(self) -> Needs:
        """The test images in order, in several views if there are crops."""
        settings = self.settings
        return Needs(test_views=TestViews(settings.crops, settings.augmix) if settings.crops else None, online=True)

    def build(self) -> None:
        """Encode the templates once and create empty caches; there are no trainable parameters."""
        super().build()
        self._stream: TDAStream | None = None

    @property
    def caches(self) -> TDAStream:
        """The caches, on the backbone's device; ``state()`` and ``load_state()`` save and load them."""
        if self._stream is None:
            settings = self.settings
            positive = PositiveCache(settings.positive_capacity, settings.positive_alpha, settings.positive_beta)
            entropy, mask = tuple(settings.negative_entropy), tuple(settings.negative_mask)
            negative = NegativeCache(
                settings.negative_capacity,
                settings.negative_alpha,
                settings.negative_beta,
                entropy,  # type: ignore[arg-type]
                mask,  # type: ignore[arg-type]
            )
            self._stream = TDAStream(
                len(self.class_names),
                self.backbone.embed_dim,
                positive if settings.positive else None,
                negative if settings.negative else None,
                self.backbone.device,
            )
        return self._stream

    def reset(self) -> None:
        """Empty the caches."""
        self._stream = None

    def stream_state(self) -> dict[str, Tensor]:
        """Return copies of the caches by name, on the CPU, for saving with safetensors."""
        return self.caches.state()

    def load_stream_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the caches from :meth:`stream_state`.

        Raises:
            HeadError: The caches have other classes, another backbone or other settings.
        """
        self.caches.load_state(state)

    @property
    def cosine_scale(self) -> float | None:
        """None: the logits are sums with the caches."""
        return None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of the next B images of the stream, in their order.

        Args:
            inputs: Images ``[B, 3, H, W]`` or their features ``[B, D]``; or views, ``[B, V, 3, H, W]`` or
                ``[B, V, D]``.
        """
        self.check_inputs(inputs)
        return self.stream(inputs if inputs.ndim in (3, 5) else inputs[:, None])

    def stream(self, views: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of the next B images from their views, ``[B, V, D]`` or ``[B, V, 3, H, W]``."""
        return self.scored(views).logits

    @torch.no_grad()
    def scored(self, views: Tensor) -> Scored:
        """Return the logits of the next B images, and what each cache contributes."""
        unit_views = self.unit_views(views)
        summary = summarise(
            unit_views, self.initial_text_features(), self.backbone.logit_scale, self.settings.confidence
        )
        return self.caches.score(summary)
