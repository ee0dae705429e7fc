"""CLIP's views of an image: from a PIL RGB picture to a normalised tensor ``[3, H, W]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from vlprompt.errors import ConfigError, did_you_mean

#: A view: PIL RGB image in, float32 tensor ``[3, size, size]`` out.
View = Callable[[Any], Any]
KINDS = ("random", "center")


class PreprocessLike(Protocol):
    """What a view needs to know of a backbone."""

    @property
    def size(self) -> int:
        """Side of the square input, in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Channel means, subtracted from values in 0..1."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Channel standard deviations."""

    @property
    def interpolation(self) -> str:
        """Name of torchvision's interpolation, ``bicubic`` for CLIP."""

    @property
    def resize_mode(self) -> str:
        """How a test image becomes square: ``shortest``, ``squash`` or ``longest``."""


def check_kind(kind: str) -> Literal["random", "center"]:
    """Return ``kind`` or raise a :class:`~vlprompt.errors.ConfigError`."""
    if kind not in KINDS:
        raise ConfigError(f"data.view is {kind!r}.{did_you_mean(str(kind), KINDS)}")
    return kind  # type: ignore[return-value]


def test_view(preprocess: PreprocessLike) -> View:
    """Return the weights' own test view; CLIP's is: shorter side to ``size``, centre crop, tensor, normalise.

    Other weights were trained with ``squash`` (both sides to ``size``) or ``longest`` (longer side to ``size``, the
    rest filled with black), as open_clip's ``image_transform`` has them.
    """
    from torchvision import transforms

    size, mode = preprocess.size, _mode(preprocess)
    if preprocess.resize_mode == "squash":
        square = [transforms.Resize((size, size), mode, antialias=True)]
    elif preprocess.resize_mode == "longest":
        from open_clip.transform import CenterCropOrPad, ResizeKeepRatio

        square = [ResizeKeepRatio(size, longest=1, interpolation=mode), CenterCropOrPad(size, fill=0)]
    else:
        square = [transforms.Resize(size, mode, antialias=True), transforms.CenterCrop(size)]
    view: View = transforms.Compose([*square, *_to_tensor(preprocess)])
    return view


# pytest collects functions of this name wherever they are imported.
test_view.__test__ = False  # type: ignore[attr-defined]


def train_view(preprocess: PreprocessLike, kind: str = "random") -> View:
    """Return CoOp's training view (``random``) or the deterministic test view (``center``).

    ``random`` is a crop of 8 to 100 % of the area with aspect 3/4 to 4/3, resized to ``size``, mirrored half of the
    time. Its numbers come from torch's default CPU generator.

    Raises:
        ConfigError: If ``kind`` is another word.
    """
    if check_kind(kind) == "center":
        return test_view(preprocess)
    from torchvision import transforms

    view: View = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocess.size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=_mode(preprocess)
            ),
            transforms.RandomHorizontalFlip(0.5),
            *_to_tensor(preprocess),
        ]
    )
    return view


def describe_view(preprocess: PreprocessLike, kind: str) -> str:
    """Return the view as one line of text: for results files and the feature store's keys."""
    size, mode = preprocess.size, preprocess.interpolation
    if check_kind(kind) == "center":
        steps = {
            "squash": f"resize to {size}x{size} {mode}",
            "longest": f"resize longer side to {size} {mode}; center pad {size}",
        }.get(preprocess.resize_mode, f"resize shorter side to {size} {mode}; center crop {size}")
    else:
        steps = f"random resized crop {size} scale 0.08-1 ratio 3/4-4/3 {mode}; mirror 0.5"
    mean, std = (", ".join(repr(float(value)) for value in part) for part in (preprocess.mean, preprocess.std))
    return f"RGB; {steps}; mean ({mean}); std ({std})"


def _mode(preprocess: PreprocessLike) -> Any:
    from torchvision.transforms import InterpolationMode

    accepted = [mode.value for mode in InterpolationMode]
    if preprocess.interpolation not in accepted:
        raise ConfigError(
            f"The backbone's preprocessing names the interpolation {preprocess.interpolation!r}."
            f"{did_you_mean(preprocess.interpolation, accepted)}"
        )
    return InterpolationMode(preprocess.interpolation)


def _to_tensor(preprocess: PreprocessLike) -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(list(preprocess.mean), list(preprocess.std))]
