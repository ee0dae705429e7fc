"""CLIP's views of an image: from a PIL RGB picture to a normalised tensor ``[3, H, W]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.data.augmix import augmix
from vlprompt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

#: Not normalised pixels: uint8, or float32 in 0..255 where AugMix has mixed them.
Pixels: TypeAlias = NDArray[Any]
#: What ``data.view`` accepts.
KINDS = ("random", "random-tensor", "random-half", "center")
#: What methods ask for by themselves: TPT's crops of a test image, and these with AugMix.
ASKED_KINDS = ("crop", "augmix")


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


Kind = Literal["random", "random-tensor", "random-half", "center"]


def check_kind(kind: str) -> Kind:
    """Return ``kind`` or raise a :class:`~vlprompt.errors.ConfigError`."""
    if kind not in KINDS:
        raise ConfigError(f"transform is {kind!r}.{did_you_mean(str(kind), KINDS)}")
    return kind  # type: ignore[return-value]


class Transform:
    """A view in two parts: the pixels of one image, which workers make, and their numbers, made for whole batches.

    ``view(picture)`` is both for one image: a PIL RGB image to float32 ``[3, size, size]``.

    The center view is the weights' own test view; CLIP's is: shorter side to ``size``, then centre crop. Other weights
    were trained with ``squash`` (both sides to ``size``) or ``longest`` (longer side to ``size``, the rest filled with
    black), as open_clip's ``image_transform`` has them. The random view is CoOp's: a crop of 8 to 100 % of the area
    with aspect 3/4 to 4/3, resized to ``size``, mirrored half of the time; its numbers come from torch's default CPU
    generator. ``random-tensor`` takes the same crops and resizes them with torch's 8-bit kernel instead of Pillow: more
    than twice as quick; values differ by a fifth of a level (of 255) on average and by a few levels at sharp edges.
    ``random-half`` is the random view with crops of at least half of the area (Tip-Adapter, ``main.py``; R-AMT).

    Two more kinds are not for ``data.view``; methods ask for them. ``crop`` is TPT's view of a test image
    (``data/datautils.py``): the random view's crops, resized by Pillow's bilinear filter whatever the weights' own is.
    ``augmix`` is ``crop`` mixed by :func:`~vlprompt.data.augmix.augmix`; its pixels are float32.

    Args:
        preprocess: The backbone's preprocessing.
        kind: ``random``, ``random-tensor``, ``center``, ``random-half``, ``crop`` or ``augmix``.

    Raises:
        ConfigError: If ``kind`` is another word, or torchvision does not know the interpolation.
    """

    def __init__(self, preprocess: PreprocessLike, kind: str) -> None:
        self.kind = kind if kind in ASKED_KINDS else check_kind(kind)
        self.random, self.by_tensor, self.mixed = kind != "center", kind == "random-tensor", kind == "augmix"
        self.size, self.mean, self.std = preprocess.size, tuple(preprocess.mean), tuple(preprocess.std)
        self._scale = _scale(kind)
        self._mode = _mode(_interpolation(preprocess, kind))
        self._square = None if self.random else _square(preprocess, self._mode)

    def __call__(self, picture: Image) -> Tensor:
        """Return float32 ``[3, size, size]`` of a PIL RGB image."""
        return self.finish(torch.from_numpy(self.pixels(picture).copy())[None])[0]

    def pixels(self, picture: Image | Pixels) -> Pixels:
        """Return uint8 ``[3, size, size]`` of an RGB picture; of the kind ``augmix`` float32 in 0..255.

        Args:
            picture: A PIL RGB image or its pixels ``[H, W, 3]``; for the center view the image.
        """
        if self._square is not None:
            return _planar(self._square(picture))
        from PIL import Image
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as F

        frame = torch.from_numpy(picture).permute(2, 0, 1) if isinstance(picture, np.ndarray) else picture
        top, left, height, width = RandomResizedCrop.get_params(frame, [*self._scale], [3 / 4, 4 / 3])
        mirrored = bool(torch.rand(1) < 0.5)
        if self.by_tensor:
            whole = picture if isinstance(picture, np.ndarray) else np.asarray(picture)
            part = torch.from_numpy(whole[top : top + height, left : left + width].copy()).permute(2, 0, 1)
            mode = str(self._mode.value)
            sharp = mode in ("bilinear", "bicubic")
            whole_batch = torch.nn.functional.interpolate(
                part[None], (self.size, self.size), mode=mode, antialias=sharp
            )
            resized: Pixels = whole_batch[0].numpy()
            return resized[:, :, ::-1] if mirrored else resized
        # The crop is cut out before it is resized: resize(box=...) would let pixels beyond its edges in.
        if isinstance(picture, np.ndarray):
            cut = Image.fromarray(picture[top : top + height, left : left + width])
        else:
            cut = picture.crop((left, top, left + width, top + height))
        crop = cut.resize((self.size, self.size), F.pil_modes_mapping[self._mode])
        if self.mixed:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop
            return _planar(augmix(crop, np.random.default_rng(int(torch.randint(2**63 - 1, (1,))))))
        pixels = _planar(crop)
        return pixels[:, :, ::-1] if mirrored else pixels

    def finish(self, images: Tensor) -> Tensor:
        """Return normalised float32 ``[..., 3, H, W]`` of pixels (:meth:`pixels`), on their device.

        The numbers are, to the bit, those of torchvision's ``ToTensor`` and ``Normalize``.
        """
        mean, std = (
            torch.tensor(part, dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for part in (self.mean, self.std)
        )
        if images.device.type == "cpu":
            # NumPy asks the system for huge pages, torch does not: filling new memory is most of the work here.
            numbers = torch.from_numpy(np.empty(tuple(images.shape), dtype=np.float32)).copy_(images)
        else:
            numbers = images.float()
        return numbers.div_(255).sub_(mean).div_(std)


def test_transform(preprocess: PreprocessLike) -> Transform:
    """Return the weights' own test view (see :class:`Transform`)."""
    return Transform(preprocess, "center")


# pytest collects functions of this name wherever they are imported.
test_transform.__test__ = False  # type: ignore[attr-defined]


def train_transform(preprocess: PreprocessLike, kind: str = "random") -> Transform:
    """Return CoOp's training view (``random``, ``random-tensor``) or the deterministic test view (``center``).

    Raises:
        ConfigError: If ``kind`` is another word.
    """
    return Transform(preprocess, kind)


def describe_transform(preprocess: PreprocessLike, kind: str) -> str:
    """Return the view as one line of text: for results files and the feature store's keys."""
    size, mode = preprocess.size, _interpolation(preprocess, kind)
    if kind not in ASKED_KINDS and check_kind(kind) == "center":
        steps = {
            "squash": f"resize to {size}x{size} {mode}",
            "longest": f"resize longer side to {size} {mode}; center pad {size}",
        }.get(preprocess.resize_mode, f"resize shorter side to {size} {mode}; center crop {size}")
    else:
        by, mixed = " by tensor" if kind == "random-tensor" else "", "; AugMix severity 1" if kind == "augmix" else ""
        steps = f"random resized crop {size} scale {_scale(kind)[0]}-1 ratio 3/4-4/3 {mode}{by}; mirror 0.5{mixed}"
    mean, std = (", ".join(repr(float(value)) for value in part) for part in (preprocess.mean, preprocess.std))
    return f"RGB; {steps}; mean ({mean}); std ({std})"


def _scale(kind: str) -> tuple[float, float]:
    """Return the shares of an image's area that a random view may take."""
    return (0.5, 1.0) if kind == "random-half" else (0.08, 1.0)


def _interpolation(preprocess: PreprocessLike, kind: str) -> str:
    # TPT gives its crops torchvision's default filter; only its test view has CLIP's.
    return "bilinear" if kind in ("crop", "augmix") else preprocess.interpolation


def _mode(name: str) -> Any:
    from torchvision.transforms import InterpolationMode

    accepted = [mode.value for mode in InterpolationMode]
    if name not in accepted:
        raise ConfigError(
            f"The backbone's preprocessing names the interpolation {name!r}.{did_you_mean(name, accepted)}"
        )
    return InterpolationMode(name)


def _planar(picture: Any) -> Pixels:
    pixels: Pixels = np.asarray(picture).transpose(2, 0, 1)
    return pixels


def _square(preprocess: PreprocessLike, mode: Any) -> Any:
    from torchvision import transforms

    size = preprocess.size
    if preprocess.resize_mode == "squash":
        return transforms.Resize((size, size), mode, antialias=True)
    if preprocess.resize_mode == "longest":
        from open_clip.transform import CenterCropOrPad, ResizeKeepRatio

        steps = [ResizeKeepRatio(size, longest=1, interpolation=mode), CenterCropOrPad(size, fill=0)]
    else:
        steps = [transforms.Resize(size, mode, antialias=True), transforms.CenterCrop(size)]
    return transforms.Compose(steps)
