"""The views of a test image that a method uses."""

from __future__ import annotations

from vlprompt.config.types import Count, validated


@validated("settings")
class TestViews:
    """Views of a test image: the test view, then random crops, then generated images.

    Attributes:
        crops: Number of random crops of 8 to 100 % of the area, mirrored with probability 0.5.
        augmix: Whether crops are mixed by AugMix.
        generated: Number of images from a diffusion bank.
    """

    __test__ = False  # pytest collects classes of this name

    crops: Count
    augmix: bool = False
    generated: Count = 0

    @property
    def count(self) -> int:
        """V, the number of views of an image."""
        return 1 + self.crops + self.generated
