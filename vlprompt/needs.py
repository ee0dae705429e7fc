"""What a method needs from a run: images or features, views, unlabelled images, an order, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Needs:
    """What a method needs from a run.

    Attributes:
        inputs: ``features``: the image tower is frozen, so image features are computed once and kept. ``images``: image
            features depend on trainable parameters.
        towers: Image towers that the method works with; image tokens need ``transformers``.
        fit_views: Number of random views of each training image for fitting on features; 0: the test view.
        fit_view: Kind of these views (:mod:`vlprompt.data.transforms`).
        fit_labelled: Whether fitting on features uses the labelled training images.
        test_views: Views of every evaluated image, ``[B, V, D]`` or ``[B, V, 3, H, W]``; None: the test view alone.
        unlabelled: Images learned from without labels: ``train``, those of the training split; ``all-classes``, these
            and the training images of the other half of the classes; ``test``, those of the test split.
        unlabelled_views: Number of random views of each unlabelled image.
        select_on: Split that the method chooses hyperparameters on; ``test`` is the published leak, and the results are
            marked as an oracle. None: it chooses nothing.
        online: Scores depend on the test images before; ``data.order`` is their order.
        gradient: Scoring differentiates, as test-time tuning does.
    """

    inputs: Literal["features", "images"] = "features"
    towers: Literal["any", "transformers"] = "any"
    fit_views: int = 0
    fit_view: Literal["random", "random-half"] = "random"
    fit_labelled: bool = True
    test_views: TestViews | None = None
    unlabelled: Literal["none", "train", "all-classes", "test"] = "none"
    unlabelled_views: int = 0
    select_on: Literal["val", "test"] | None = None
    online: bool = False
    gradient: bool = False

    @property
    def images(self) -> bool:
        """Whether image features depend on trainable parameters."""
        return self.inputs == "images"

    @property
    def transductive(self) -> bool:
        """Whether images of new classes or test images are learned from without labels; results are marked."""
        return self.unlabelled in ("all-classes", "test")
