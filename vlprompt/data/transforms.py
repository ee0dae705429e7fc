"""Image transforms: a PIL RGB image to a normalised tensor ``[3, H, W]``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.config.run import TransformKind
from vlprompt.data.augmix import augmix
from vlprompt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels before normalisation: uint8, or float32 in 0..255 after AugMix.
Pixels: TypeAlias = NDArray[Any]
#: Kinds accepted for training images.
KINDS: tuple[TransformKind, ...] = get_args(TransformKind)
#: Kinds that make every image of a run square in their way, test images included: the resize mode of each.
WHOLE_KINDS = {"pad": "longest", "squash": "squash"}
#: Kinds without random draws.
FIXED_KINDS = ("center", *WHOLE_KINDS)
#: Further kinds, for test-time methods: TPT's crops of a test image, without and with AugMix.
VIEW_KINDS = ("crop", "augmix")


class PreprocessLike(Protocol):
    """The preprocessing of a backbone, as transforms use it."""

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

    @property
    def fill_color(self) -> int:
        """Level, 0 to 255, of the border of ``longest``."""


def check_kind(kind: str) -> TransformKind:
    """Return ``kind`` or raise a :class:`~vlprompt.errors.ConfigError`."""
    if kind not in KINDS:
        raise ConfigError(f"transform is {kind!r}.{did_you_mean(str(kind), KINDS)}")
    return kind


@dataclass(frozen=True)
class _Constants:
    """The constants of a :class:`PreprocessLike`."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    fill_color: int


def of_test_images(preprocess: PreprocessLike, kind: TransformKind) -> tuple[PreprocessLike, TransformKind]:
    """Return the preprocessing whose test transform is ``pad`` or ``squash``, and ``center``; other kinds as given."""
    if kind not in WHOLE_KINDS:
        return preprocess, kind
    values = {field.name: getattr(preprocess, field.name) for field in fields(_Constants)}
    return _Constants(**{**values, "resize_mode": WHOLE_KINDS[kind]}), "center"


class Transform:
    """An image transform in two steps: :meth:`pixels` in workers, :meth:`finish` (normalisation) for complete batches.

    ``transform(image)`` does both steps for one image: a PIL RGB image to float32 ``[3, size, size]``.

    - ``center``: the backbone's test transform. CLIP's resizes the shorter side to ``size`` and takes the centre crop.
      Other weights were trained with ``squash`` (both sides to ``size``) or ``longest`` (longer side to ``size``,
      padded), as in open_clip's ``image_transform``.
    - ``pad`` and ``squash``: open_clip's ``longest`` and ``squash``, whatever the weights were trained with. They cut
      nothing off. In a run they are the transform of test images as well (:meth:`vlprompt.Backbone.resizing`).
    - ``random``: CoOp's training transform, a crop of 8 to 100 % of the area with aspect ratio 3/4 to 4/3, resized to
      ``size`` and mirrored with probability 0.5. Random numbers come from torch's default CPU generator.
    - ``random-tensor``: the same crops, resized by torch's 8-bit kernel instead of Pillow. More than twice as fast;
      values differ by a fifth of a level (of 255) on average and by a few levels at sharp edges.
    - ``random-half``: ``random`` with crops of at least half of the area (Tip-Adapter, ``main.py``; R-AMT).
    - ``crop``: TPT's crop of a test image (``data/datautils.py``): the crops of ``random``, always resized by Pillow's
      bilinear filter. Not for training images.
    - ``augmix``: ``crop`` mixed by :func:`~vlprompt.data.augmix.augmix`; pixels are float32. Not for training images.

    Args:
        preprocess: The backbone's preprocessing.
        kind: One of the kinds above.

    Raises:
        ConfigError: If ``kind`` or the interpolation is unknown.
    """

    def __init__(self, preprocess: PreprocessLike, kind: str) -> None:
        self.kind = kind if kind in VIEW_KINDS else check_kind(kind)
        self.random, self.by_tensor, self.mixed = kind not in FIXED_KINDS, kind == "random-tensor", kind == "augmix"
        self.size, self.mean, self.std = preprocess.size, tuple(preprocess.mean), tuple(preprocess.std)
        self._scale = _scale(kind)
        self._mode = _mode(_interpolation(preprocess, kind))
        self._square = None if self.random else _square(preprocess, self._mode, _resize_mode(preprocess, kind))

    def __call__(self, image: Image) -> Tensor:
        """Return float32 ``[3, size, size]`` of a PIL RGB image."""
        return self.finish(torch.from_numpy(self.pixels(image).copy())[None])[0]

    def pixels(self, image: Image | Pixels) -> Pixels:
        """Return uint8 ``[3, size, size]`` of an RGB image; for ``augmix``, float32 in 0..255.

        Args:
            image: A PIL RGB image, or its pixels ``[H, W, 3]``; without random draws, a PIL image.
        """
        if self._square is not None:
            return _planar(self._square(image))
        from PIL import Image
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as F

        frame = torch.from_numpy(image).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
        top, left, height, width = RandomResizedCrop.get_params(frame, [*self._scale], [3 / 4, 4 / 3])
        mirrored = bool(torch.rand(1) < 0.5)
        if self.by_tensor:
            array = image if isinstance(image, np.ndarray) else np.asarray(image)
            cut_pixels = torch.from_numpy(array[top : top + height, left : left + width].copy()).permute(2, 0, 1)
            mode = str(self._mode.value)
            sharp = mode in ("bilinear", "bicubic")
            batch = torch.nn.functional.interpolate(
                cut_pixels[None], (self.size, self.size), mode=mode, antialias=sharp
            )
            resized: Pixels = batch[0].numpy()
            return resized[:, :, ::-1] if mirrored else resized
        # The crop is cut out before resizing: resize(box=...) would include pixels outside its edges.
        if isinstance(image, np.ndarray):
            cut = Image.fromarray(image[top : top + height, left : left + width])
        else:
            cut = image.crop((left, top, left + width, top + height))
        crop = cut.resize((self.size, self.size), F.pil_modes_mapping[self._mode])
        if self.mixed:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop
            return _planar(augmix(crop, np.random.default_rng(int(torch.randint(2**63 - 1, (1,))))))
        pixels = _planar(crop)
        return pixels[:, :, ::-1] if mirrored else pixels

    def finish(self, images: Tensor) -> Tensor:
        """Return normalised float32 ``[..., 3, H, W]`` of pixels from :meth:`pixels`, on their device.

        The result is bit-identical to torchvision's ``ToTensor`` and ``Normalize``.
        """
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        if images.device.type == "cpu":
            # NumPy allocates huge pages, torch does not; most of the time is spent on filling new memory.
            values = torch.from_numpy(np.empty(tuple(images.shape), dtype=np.float32)).copy_(images)
        else:
            values = images.float()
        return values.div_(255).sub_(mean).div_(std)


def test_transform(preprocess: PreprocessLike) -> Transform:
    """Return the backbone's test transform (``center`` of :class:`Transform`)."""
    return Transform(preprocess, "center")


# pytest would collect a function of this name from modules that import it.
test_transform.__test__ = False  # type: ignore[attr-defined]


def train_transform(preprocess: PreprocessLike, kind: str = "random") -> Transform:
    """Return a transform of training images, by default CoOp's (see :class:`Transform` for the kinds).

    Raises:
        ConfigError: If ``kind`` is unknown.
    """
    return Transform(preprocess, kind)


def describe_transform(preprocess: PreprocessLike, kind: str) -> str:
    """Return a one-line description of a transform, for results files and keys of the feature store."""
    size, mode = preprocess.size, _interpolation(preprocess, kind)
    if kind not in VIEW_KINDS and check_kind(kind) in FIXED_KINDS:
        fill = f" with {preprocess.fill_color}" if preprocess.fill_color else ""
        steps = {
            "squash": f"resize to {size}x{size} {mode}",
            "longest": f"resize longer side to {size} {mode}; center pad {size}{fill}",
        }.get(_resize_mode(preprocess, kind), f"resize shorter side to {size} {mode}; center crop {size}")
    else:
        by, mixed = " by tensor" if kind == "random-tensor" else "", "; AugMix severity 1" if kind == "augmix" else ""
        steps = f"random resized crop {size} scale {_scale(kind)[0]}-1 ratio 3/4-4/3 {mode}{by}; mirror 0.5{mixed}"
    mean, std = (", ".join(repr(float(value)) for value in values) for values in (preprocess.mean, preprocess.std))
    return f"RGB; {steps}; mean ({mean}); std ({std})"


def _scale(kind: str) -> tuple[float, float]:
    """Return the range of a random crop's area, as fractions of the image."""
    return (0.5, 1.0) if kind == "random-half" else (0.08, 1.0)


def _resize_mode(preprocess: PreprocessLike, kind: str) -> str:
    return WHOLE_KINDS.get(kind, preprocess.resize_mode)


def _interpolation(preprocess: PreprocessLike, kind: str) -> str:
    # TPT resizes crops with torchvision's default filter; only its test transform uses CLIP's.
    return "bilinear" if kind in ("crop", "augmix") else preprocess.interpolation


def _mode(name: str) -> Any:
    from torchvision.transforms import InterpolationMode

    accepted = [mode.value for mode in InterpolationMode]
    if name not in accepted:
        raise ConfigError(
            f"The interpolation of the backbone's preprocessing is {name!r}.{did_you_mean(name, accepted)}"
        )
    return InterpolationMode(name)


def _planar(image: Any) -> Pixels:
    pixels: Pixels = np.asarray(image).transpose(2, 0, 1)
    return pixels


def _square(preprocess: PreprocessLike, mode: Any, resize_mode: str) -> Any:
    from torchvision import transforms

    size = preprocess.size
    if resize_mode == "squash":
        return transforms.Resize((size, size), mode, antialias=True)
    if resize_mode == "longest":
        from open_clip.transform import CenterCropOrPad, ResizeKeepRatio

        pad = CenterCropOrPad(size, fill=preprocess.fill_color)
        steps = [ResizeKeepRatio(size, longest=1, interpolation=mode), pad]
    else:
        steps = [transforms.Resize(size, mode, antialias=True), transforms.CenterCrop(size)]
    return transforms.Compose(steps)
