"""Small fixed changes of an image, named by what stands behind ``#`` in its path.

``openmoji/1F408.webp#3`` is the third variant of a drawing: a little turned, scaled, shifted and brightened or
darkened, always in the same way. ``#noise`` and ``#blur`` are corruptions: Gaussian noise of deviation 0.1 (for values
in 0 ... 1), and a Gaussian blur of one 64th of the image's side. Few drawings so give many shots, without storing them,
and a test image has corrupted twins. Only data sets whose card says ``variants: true`` have them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlprompt._random import hashed_number
from vlprompt.datasets.images import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

CORRUPTIONS = ("noise", "blur")
NOISE_DEVIATION, BLUR_OF_SIDE = 0.1, 1 / 64


def split_variant(path: str) -> tuple[str, str]:
    """Return the image's own path and the variant; the variant is empty where there is none."""
    own, _, variant = path.partition("#")
    return own, variant


def variant_problem(path: str) -> str | None:
    """Return why ``path`` does not name a variant that exists, or ``None`` if it does (or names none)."""
    own, mark, variant = path.partition("#")
    if not mark or variant in CORRUPTIONS or (variant.isascii() and variant.isdigit() and len(variant) < 4):
        return None
    return f"variant {variant!r} of {own}; accepted: {', '.join(CORRUPTIONS)}, or a number up to 999"


@dataclass(frozen=True)
class VariantSource:
    """A variant of another image.

    Attributes:
        source: The image as it is stored.
        variant: ``noise``, ``blur``, or a number.
        key: The image's path; the change is drawn from it and the variant, so that it never changes.
    """

    source: ImageSource
    variant: str
    key: str

    def open(self) -> Image:
        """Return the changed RGB image."""
        picture = self.source.open()
        if self.variant == "blur":
            from PIL import ImageFilter

            return picture.filter(ImageFilter.GaussianBlur(max(picture.size) * BLUR_OF_SIDE))
        if self.variant == "noise":
            return _noisy(picture, f"{self.key}#noise")
        return _moved(picture, random.Random(f"{self.key}#{self.variant}"))

    def stamp(self) -> str:
        """Return the image's own stamp and the variant."""
        return f"{self.source.stamp()}#{self.variant}"


def _moved(picture: Image, generator: random.Random) -> Image:
    from PIL import Image, ImageEnhance

    turn, zoom = generator.uniform(-14, 14), generator.uniform(0.75, 1.05)
    right, down = generator.uniform(-1, 1), generator.uniform(-1, 1)
    light = generator.uniform(0.85, 1.1)
    width, height = picture.size
    size = max(8, round(width * zoom)), max(8, round(height * zoom))
    turned = picture.rotate(turn, Image.Resampling.BICUBIC, fillcolor="white").resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", picture.size, "white")
    left, top = (width - size[0]) / 2 + right * width / 16, (height - size[1]) / 2 + down * height / 16
    canvas.paste(turned, (round(left), round(top)))
    return ImageEnhance.Brightness(canvas).enhance(light)


def _noisy(picture: Image, key: str) -> Image:
    import numpy as np
    from PIL import Image

    # NumPy promises the bits of PCG64 for ever, not those of its normal numbers: sums of uniform ones take their place.
    seed = hashed_number(key)
    pixels = np.asarray(picture, dtype=np.float64)
    raw = np.random.PCG64(seed).random_raw(12 * pixels.size).reshape(12, *pixels.shape)
    normal = (raw >> np.uint64(11)).astype(np.float64).sum(0) / 2.0**53 - 6.0
    return Image.fromarray(np.clip(pixels + 255 * NOISE_DEVIATION * normal, 0, 255).round().astype(np.uint8), "RGB")
