"""Augmentations of drawings in training: geometry, colours, backgrounds, line drawings, noise and blur."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


def premultiplied(pixels: Tensor) -> Tensor:
    """Turn straight RGBA bytes ``[B, 64, 64, 4]`` into floats ``[B, 4, 64, 64]``, colours times opacity."""
    floats = pixels.permute(0, 3, 1, 2).float() / 255
    return torch.cat([floats[:, :3] * floats[:, 3:], floats[:, 3:]], 1)


def on_white(pixels: Tensor) -> Tensor:
    """Return straight RGBA bytes on a white background: ``[B, 3, 64, 64]`` in 0 ... 1."""
    floats = premultiplied(pixels)
    return floats[:, :3] + 1 - floats[:, 3:]


def normalised(images: Tensor) -> Tensor:
    """Normalise images in 0 ... 1 with CLIP's constants."""
    return (images - MEAN) / STD


class Views:
    """Random augmentations of a batch with one generator.

    Args:
        generator: The only source of randomness.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator) * (high - low) + low

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def __call__(self, pixels: Tensor, may_flip: Tensor) -> Tensor:
        """Return normalised, augmented images ``[B, 3, 64, 64]`` of straight RGBA bytes ``[B, 64, 64, 4]``.

        Args:
            pixels: The drawings.
            may_flip: ``[B]``, whether the mirrored drawing has the same meaning.
        """
        warped = self._warped(premultiplied(pixels), may_flip)
        images = self._stylised(self._recoloured(warped), warped[:, 3:])
        return normalised(self._corrupted(images))

    def _warped(self, images: Tensor, may_flip: Tensor) -> Tensor:
        count = len(images)
        turn, zoom = self._uniform(-0.28, 0.28, count), self._uniform(0.8, 1.3, count)
        aspect, shear = self._uniform(-0.12, 0.12, count).exp(), self._uniform(-0.12, 0.12, count)
        right, down = self._uniform(-0.15, 0.15, count), self._uniform(-0.15, 0.15, count)
        flip = torch.where((self._uniform(0, 1, count) < 0.4) & may_flip, -1.0, 1.0)
        cos, sin = turn.cos(), turn.sin()
        rows = (
            torch.stack([cos * zoom * aspect * flip, (sin + shear) * zoom, right], -1),
            torch.stack([-sin * zoom * flip, cos * zoom / aspect, down], -1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), [count, 4, 64, 64], align_corners=False)
        bend = self._normal(count, 2, 5, 5) * self._uniform(0, 0.045, count, 1, 1, 1)
        bend = F.interpolate(bend, size=(64, 64), mode="bicubic", align_corners=True)
        return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False, padding_mode="zeros")

    def _recoloured(self, images: Tensor) -> Tensor:
        count = len(images)
        colour, opacity = images[:, :3], images[:, 3:]
        kind = self._uniform(0, 1, count, 1, 1, 1)
        pale, any_colour = self._uniform(0.5, 1, count, 3, 1, 1), self._uniform(0, 1, count, 3, 1, 1)
        background = torch.where(kind < 0.55, torch.ones(()), torch.where(kind < 0.9, pale, any_colour))
        matrix = torch.eye(3) + self._normal(count, 3, 3) * 0.13 * (self._uniform(0, 1, count, 1, 1) < 0.8)
        saturation = self._uniform(0.4, 1.4, count, 1, 1)
        saturation = saturation * (self._uniform(0, 1, count, 1, 1) >= 0.12)
        matrix = matrix @ (saturation * torch.eye(3) + (1 - saturation) * _LUMINANCE.expand(3, 3))
        colour = torch.einsum("bij,bjhw->bihw", matrix, colour) * self._uniform(0.75, 1.25, count, 1, 1, 1)
        colour = colour + self._uniform(-0.125, 0.125, count, 1, 1, 1) * opacity
        return (colour + background * (1 - opacity)).clamp(0, 1)

    def _stylised(self, images: Tensor, opacity: Tensor) -> Tensor:
        """Turn some images into line drawings, some into hard black and white, and some into negatives."""
        kind = self._uniform(0, 1, len(images))
        grey = (images * _LUMINANCE.view(1, 3, 1, 1)).sum(1, keepdim=True)
        lines, hard, negative = kind < 0.08, (kind >= 0.08) & (kind < 0.13), (kind >= 0.13) & (kind < 0.16)

        def edges(values: Tensor) -> Tensor:
            return F.max_pool2d(values, 3, 1, 1) + F.max_pool2d(-values, 3, 1, 1)

        drawn = 1 - 1.3 * (1.5 * edges(grey[lines]) + edges(opacity[lines])).clamp(0, 1)
        images[lines] = drawn.clamp(0, 1).expand(-1, 3, -1, -1)
        middle = grey[hard].mean((1, 2, 3), keepdim=True)
        images[hard] = ((grey[hard] - middle) * 20).sigmoid().expand(-1, 3, -1, -1)
        images[negative] = 1 - images[negative]
        return images

    def _corrupted(self, images: Tensor) -> Tensor:
        """Blur a fifth of the images and add noise to a third, for robustness to both."""
        kind = self._uniform(0, 1, len(images))
        soft = kind < 0.2
        images[soft] = blurred(images[soft], self._uniform(0.5, 1.6, int(soft.sum())))
        noisy = (kind >= 0.15) & (kind < 0.5)
        strength = self._uniform(0, 0.16, int(noisy.sum()), 1, 1, 1)
        images[noisy] = (images[noisy] + self._normal(*images[noisy].shape) * strength).clamp(0, 1)
        return images


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of ``images`` ``[B, 3, H, W]`` with a Gaussian of its ``sigma`` ``[B]``, in pixels."""
    if not len(images):
        return images
    place = torch.arange(-4, 5).float()
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    rows = F.pad(images, (4, 4, 4, 4), mode="replicate").reshape(1, -1, images.shape[2] + 8, images.shape[3] + 8)
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=rows.shape[1])
    return F.conv2d(rows, kernel[:, None, :, None], groups=rows.shape[1]).reshape(images.shape)
