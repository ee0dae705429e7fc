"""DiffTPT: TPT on random crops and pictures that a diffusion model made of the test image (Feng et al., ICCV 2023).

Generated images (arXiv 2308.06038) are read from a bank on disk: ``vlprompt bank`` and ``data.bank``. A cosine filter
drops those that are too different from the test image, an entropy filter keeps confident ones, and four steps of TPT
follow. Without generated images and with every view passing the cosine filter the method is TPT.

Paper and published code disagree in three places, and ``variant`` selects (chunmeifeng/DiffTPT, issue 10):

- filtering: the code applies both filters in sequence to crops and generated images together, and view 0 passes the
  first; the paper filters crops (with view 0) by entropy only, and generated images by both;
- cosine: the code compares logits with those of the test view; the paper compares images, here by their features;
- input of the diffusion model: the normalised image in the code, its CLIP feature in the paper. The bank's recipe
  records this; any bank is accepted here.

The published results use the default, ``code``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlprompt.config.types import Count, validated
from vlprompt.methods.registry import register
from vlprompt.methods.tpt import TPT, TPTSettings
from vlprompt.needs import Needs, TestViews
from vlprompt.testtime.selection import Filtered, Variant, ViewFraction, filter_views


@validated("settings")
class DiffTPTSettings(TPTSettings):
    """Settings of DiffTPT: those of TPT, and those of the generated images and filters.

    Attributes:
        steps: Steps per image.
        confidence: Fraction of its input views that the entropy filter keeps.
        crops: Random crops of each image.
        similarity: Fraction that the cosine filter keeps.
        generated: Generated images of the bank for each image; 0 for none.
        variant: Paper or code, which differ as listed above.
    """

    steps: Count = 4
    confidence: ViewFraction = 0.3
    crops: Count = 64
    similarity: ViewFraction = 0.8
    generated: Count = 63
    variant: Variant = "code"

    filters: ClassVar[tuple[str, ...]] = ("confidence", "similarity", "variant")

    def views_besides(self) -> int:
        """Return the number of views of an image in addition to the test view."""
        return self.crops + self.generated


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
        """Return the views that each filter keeps, from logits ``[B, V, C]`` and unit features ``[B, V, D]``."""
        settings = self.settings
        return filter_views(
            logits,
            features,
            similarity=settings.similarity,
            confidence=settings.confidence,
            generated=settings.generated,
            variant=settings.variant,
        )
