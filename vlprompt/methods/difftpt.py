"""DiffTPT: TPT on random crops and pictures that a diffusion model made of the test image (Feng et al., ICCV 2023).

Generated pictures (arXiv 2308.06038) come from a bank on disk: ``vlprompt bank`` and ``data.bank``. A
cosine filter drops those that have drifted from the test image, an entropy filter keeps sure ones, and four steps of
TPT follow; without generated pictures, with every view passing the cosine filter, it is TPT.

Paper and published code disagree in three places, and ``variant`` selects (chunmeifeng/DiffTPT, issue 10):

- filtering: the code runs both filters one after the other over crops and generated pictures alike, and view 0 passes
  the first; the paper filters the two kinds apart, crops (with view 0) by entropy alone, generated pictures by both;
- cosine: the code compares logits with those of the test view; the paper compares the images, here by their features;
- what the diffusion model is given: the code the normalised image, the paper its CLIP feature. That is a matter of the
  bank's recipe, which has its own record; this file takes any bank.

The default, ``code``, made the published numbers.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.config.types import Count, validated
from vlprompt.methods.registry import register
from vlprompt.methods.tpt import TPT, TPTSettings
from vlprompt.needs import Needs, TestViews
from vlprompt.testtime.selection import Filtered, Variant, ViewFraction, filter_views


@validated("settings")
class DiffTPTSettings(TPTSettings):
    """Settings of DiffTPT, beside those of TPT.

    Attributes:
        steps: Steps per image.
        confidence: Fraction of the views before it that the entropy filter keeps.
        crops: Random crops of each image.
        similarity: Fraction that the cosine filter keeps.
        generated: Pictures of the bank for each image; 0 for none.
        variant: Where paper and code disagree, see above.
    """

    steps: Count = 4
    confidence: ViewFraction = 0.3
    crops: Count = 64
    similarity: ViewFraction = 0.8
    generated: Count = 63
    variant: Variant = "code"


@register("difftpt")
class DiffTPT(TPT):
    """TPT with generated views and two filters."""

    Settings = DiffTPTSettings
    settings: DiffTPTSettings

    @property
    def needs(self) -> Needs:
        """Crops and generated images of each test image, and gradients."""
        settings = self.settings
        return Needs(test_views=TestViews(settings.crops, settings.augmix, settings.generated), gradient=True)

    def select(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the views ``[B, n]`` that pass both filters."""
        return self.filtered(logits, features).selected

    def filtered(self, logits: Tensor, features: Tensor) -> Filtered:
        """Return what each filter keeps, by logits ``[B, V, C]`` and unit features ``[B, V, D]``."""
        own = self.settings
        return filter_views(
            logits,
            features,
            similarity=own.similarity,
            confidence=own.confidence,
            generated=own.generated,
            variant=own.variant,
        )
