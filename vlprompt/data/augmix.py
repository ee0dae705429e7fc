"""AugMix as in TPT (``data/augmix_ops.py`` and ``data/datautils.py`` of its code; Hendrycks et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

CHAINS = 3
LONGEST = 3
#: Function of an image, a level in 0.1..1 (severity 1) and a direction (1 or -1); returns an image of the same size.
Operation = Callable[["Image", float, int], "Image"]


def augmix(image: Image, rng: np.random.Generator) -> NDArray[np.float32]:
    """Mix an image with three chains of operations on it.

    ``m x + (1 - m) sum_i w_i chain_i(x)`` with ``w ~ Dirichlet(1, 1, 1)``, ``m ~ Beta(1, 1)``, and chains of one to
    three operations drawn with replacement. TPT mixes normalised images; because the weights sum to 1, mixing pixels
    and normalising the mixture is equivalent.

    Args:
        image: A PIL RGB image of H x W pixels.
        rng: Generator of all draws.

    Returns:
        Pixels ``[H, W, 3]`` in 0..255, not rounded.
    """
    weights = rng.dirichlet(np.ones(CHAINS))
    share = rng.beta(1.0, 1.0)
    mixture = np.zeros((image.height, image.width, 3))
    for weight in weights:
        changed = image
        for _ in range(rng.integers(1, LONGEST + 1)):
            operation = OPERATIONS[rng.integers(len(OPERATIONS))]
            changed = operation(changed, rng.uniform(0.1, 1.0), 1 if rng.uniform() < 0.5 else -1)
        mixture += weight * np.asarray(changed, dtype=np.float64)
    mixed = share * np.asarray(image, dtype=np.float64) + (1 - share) * mixture
    return mixed.astype(np.float32)


def autocontrast(image: Image, level: float, sign: int) -> Image:
    """Stretch every channel to 0..255."""
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def equalize(image: Image, level: float, sign: int) -> Image:
    """Make every channel's histogram flat."""
    from PIL import ImageOps

    return ImageOps.equalize(image)


def posterize(image: Image, level: float, sign: int) -> Image:
    """Keep the four upper bits; at severity 1 the level rounds down to 0 further bits."""
    from PIL import ImageOps

    return ImageOps.posterize(image, 4 - int(0.4 * level))


def rotate(image: Image, level: float, sign: int) -> Image:
    """Rotate by 0, 1, 2 or (only at level 1) 3 degrees."""
    from PIL import Image

    return image.rotate(sign * int(3 * level), resample=Image.Resampling.BILINEAR)


def solarize(image: Image, level: float, sign: int) -> Image:
    """Invert values of at least 256 - 25.6 ``level``."""
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - int(25.6 * level))


def shear_x(image: Image, level: float, sign: int) -> Image:
    """Shear rows by up to 3 %."""
    return _affine(image, (1, sign * 0.03 * level, 0, 0, 1, 0))


def shear_y(image: Image, level: float, sign: int) -> Image:
    """Shear columns by up to 3 %."""
    return _affine(image, (1, 0, 0, sign * 0.03 * level, 1, 0))


def translate_x(image: Image, level: float, sign: int) -> Image:
    """Move by up to a thirtieth of the width, in whole pixels (7 of 224)."""
    return _affine(image, (1, 0, sign * int(level * image.width / 30), 0, 1, 0))


def translate_y(image: Image, level: float, sign: int) -> Image:
    """Move by up to a thirtieth of the height, in whole pixels."""
    return _affine(image, (1, 0, 0, 0, 1, sign * int(level * image.height / 30)))


def _affine(image: Image, matrix: tuple[float, ...]) -> Image:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


#: Operations, drawn with equal probability.
OPERATIONS: tuple[Operation, ...] = (
    autocontrast,
    equalize,
    posterize,
    rotate,
    solarize,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)
