"""Variants of an image: small deterministic changes, named after ``#`` in its path.

``openmoji/1F408.webp#3`` is the third variant of a drawing: slightly rotated, scaled, shifted and brightened or
darkened. ``#noise`` and ``#blur`` are corruptions: Gaussian noise of standard deviation 0.1 (for values in 0..1), and
a Gaussian blur of 1/64 of the image's side. Variants give many shots from few stored drawings, and corrupted versions
of test images. Only data sets whose card states ``variants: true`` have them.
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
    """Return the image's path and the variant, which is empty if there is none."""
    image_path, _, variant = path.partition("#")
    return image_path, variant


def variant_problem(path: str) -> str | None:
    """Return why the variant of ``path`` does not exist, or ``None`` if it does or ``path`` names none."""
    image_path, mark, variant = path.partition("#")
    if not mark or variant in CORRUPTIONS or (variant.isascii() and variant.isdigit() and len(variant) < 4):
        return None
    return f"variant {variant!r} of {image_path}; accepted: {', '.join(CORRUPTIONS)}, or a number up to 999"


@dataclass(frozen=True)
class VariantSource:
    """A variant of another image.

    Attributes:
        source: The stored image.
        variant: ``noise``, ``blur``, or a number.
        key: The image's path; the change depends on the key and the variant only.
    """

    source: ImageSource
    variant: str
    key: str

    def open(self) -> Image:
        """Return the changed RGB image."""
        image = self.source.open()
        if self.variant == "blur":
            from PIL import ImageFilter

            return image.filter(ImageFilter.GaussianBlur(max(image.size) * BLUR_OF_SIDE))
        if self.variant == "noise":
            return _noisy(image, f"{self.key}#noise")
        return _moved(image, random.Random(f"{self.key}#{self.variant}"))

    def stamp(self) -> str:
        """Return the stamp of the stored image and the variant."""
        return f"{self.source.stamp()}#{self.variant}"

    def stored_bytes(self) -> int:
        """Return the size of the stored image."""
        return self.source.stored_bytes()

    def content(self) -> str:
        """Return the SHA-256 of the stored image and the variant."""
        return f"{self.source.content()}#{self.variant}"


def _moved(image: Image, generator: random.Random) -> Image:
    from PIL import Image, ImageEnhance

    turn, zoom = generator.uniform(-14, 14), generator.uniform(0.75, 1.05)
    right, down = generator.uniform(-1, 1), generator.uniform(-1, 1)
    light = generator.uniform(0.85, 1.1)
    width, height = image.size
    size = max(8, round(width * zoom)), max(8, round(height * zoom))
    turned = image.rotate(turn, Image.Resampling.BICUBIC, fillcolor="white").resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", image.size, "white")
    left, top = (width - size[0]) / 2 + right * width / 16, (height - size[1]) / 2 + down * height / 16
    canvas.paste(turned, (round(left), round(top)))
    return ImageEnhance.Brightness(canvas).enhance(light)


def _noisy(image: Image, key: str) -> Image:
    import numpy as np
    from PIL import Image

    # NumPy guarantees the bit stream of PCG64 but not its normal numbers, so normals are sums of 12 uniform numbers.
    seed = hashed_number(key)
    pixels = np.asarray(image, dtype=np.float64)
    raw = np.random.PCG64(seed).random_raw(12 * pixels.size).reshape(12, *pixels.shape)
    normal = (raw >> np.uint64(11)).astype(np.float64).sum(0) / 2.0**53 - 6.0
    return Image.fromarray(np.clip(pixels + 255 * NOISE_DEVIATION * normal, 0, 255).round().astype(np.uint8), "RGB")
