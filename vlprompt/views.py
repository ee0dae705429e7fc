"""The views of a test image that a method uses."""

from __future__ import annotations

from dataclasses import dataclass

from vlprompt.errors import ConfigError


@dataclass(frozen=True)
class TestViews:
    """Views of a test image: the test view, then random crops, then generated images.

    Attributes:
        crops: Number of random crops of 8 to 100 % of the area, mirrored with probability 0.5.
        augmix: Whether crops are mixed by AugMix.
        generated: Number of images from a diffusion bank.

    Raises:
        ConfigError: A number is negative.
    """

    __test__ = False  # pytest collects classes of this name

    crops: int
    augmix: bool = False
    generated: int = 0

    def __post_init__(self) -> None:
        for name in ("crops", "generated"):
            if getattr(self, name) < 0:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; accepted: 0 or more views")

    @property
    def count(self) -> int:
        """V, the number of views of an image."""
        return 1 + self.crops + self.generated
