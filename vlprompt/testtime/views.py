"""Which views of a test image a method looks at."""

from __future__ import annotations

from dataclasses import dataclass

from vlprompt.errors import ConfigError


@dataclass(frozen=True)
class TestViews:
    """The test view, then random crops, then generated pictures.

    Attributes:
        crops: Random views: crops of 8 to 100 % of the area, mirrored half of the time.
        augmix: Whether crops are mixed by AugMix.
        generated: Pictures of a diffusion bank.

    Raises:
        ConfigError: A negative number.
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
