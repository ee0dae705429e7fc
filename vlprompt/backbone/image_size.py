"""Other image sizes than that of the weights, by interpolation of position embeddings, as in open_clip and timm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbone.architecture import Config
from vlprompt.errors import BackboneError

POSITIONS = "visual.positional_embedding"
LARGEST = 4096
"""Largest accepted image side, in pixels."""


def check_image_size(image_size: Any) -> None:
    """Raise BackboneError unless ``image_size`` is None or a side in pixels."""
    if image_size is None:
        return
    if isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= LARGEST:
        raise BackboneError(f"image_size is {image_size!r}; accepted: a side of 1 to {LARGEST} pixels, or None")


def config_of_size(config: Config, image_size: int | None, name: str) -> Config:
    """Return an architecture for images of ``image_size`` pixels; None leaves it as it is.

    Raises:
        BackboneError: The image tower is a ResNet of CLIP, or its patches do not divide the images.
    """
    if image_size is None:
        return config
    vision = config["vision_cfg"]
    own = vision.get("image_size", 224)
    if isinstance(vision.get("layers"), list | tuple) and image_size != own:
        raise BackboneError(
            f"image_size is {image_size}, but the image tower of {name} is a ResNet, whose attention pool takes {own} "
            "pixels only; position embeddings are interpolated for vision transformers.\n"
            f"Omit --backbone.image_size, or use one, e.g. --backbone.name ViT-B-16 --backbone.image_size {image_size}"
        )
    if not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list | tuple):
        _check_patches(image_size, vision.get("patch_size", 16), name)
    config = deepcopy(config)
    config["vision_cfg"]["image_size"] = image_size
    return config


def _check_patches(image_size: int, patch: int, name: str) -> None:
    if image_size % patch:
        below = image_size // patch * patch
        nearest = " or ".join(str(side) for side in (below, below + patch) if 0 < side <= LARGEST)
        raise BackboneError(
            f"image_size is {image_size}, which the {patch} x {patch} patches of {name} do not divide, so that the "
            f"edge of every image would be lost; accepted: multiples of {patch}, such as {nearest}"
        )


def interpolated(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the position embeddings of the image size of ``model``: open_clip's ``resize_pos_embed``.

    They are those of a class token, which is kept, and of a square grid, which is interpolated (bicubic, antialiased).
    """
    from open_clip.model import resize_pos_embed

    fitted = dict(state)
    positions = fitted.get(POSITIONS)
    if positions is not None and positions.ndim == 2 and grid_side(positions) is not None:
        resize_pos_embed(fitted, model)
    return fitted


def grid_side(positions: Tensor) -> int | None:
    """Return the side of the square grid in position embeddings ``[1 + side * side, W]``; None if it is no square."""
    side = math.isqrt(max(len(positions) - 1, 0))
    return side if side and side * side + 1 == len(positions) else None


def other_size(model: Any, state: Mapping[str, Tensor], shapes: Sequence[str]) -> str:
    """Return how to use weights whose position embeddings alone do not fit; empty in other cases.

    Args:
        model: The network.
        state: The tensors.
        shapes: Names of the tensors with a wrong shape.
    """
    if list(shapes) != [POSITIONS]:
        return ""
    own, wanted = (grid_side(positions) for positions in (state[POSITIONS], model.state_dict()[POSITIONS]))
    if own is None or wanted is None or state[POSITIONS].shape[1] != model.state_dict()[POSITIONS].shape[1]:
        return ""
    patch = model.visual.conv1.kernel_size[0]
    return (
        f"The weights are those of images of {own * patch} pixels, and the architecture takes {wanted * patch}. To "
        f"interpolate the position embeddings, choose the size: --backbone.image_size {wanted * patch} (or "
        f"{own * patch}, without interpolation)"
    )


def set_input_size(model: Any, image_size: int, name: str) -> None:
    """Set the image size of a loaded timm tower; in full precision, run it once on an empty image.

    Raises:
        BackboneError: The tower cannot take images of that size.
    """
    visual = model.visual
    try:
        if hasattr(visual, "set_input_size"):
            patch = getattr(getattr(visual.trunk, "patch_embed", None), "patch_size", None)
            if isinstance(patch, tuple):
                _check_patches(image_size, patch[0], name)
            visual.set_input_size(image_size)
        kind = next(parameter.dtype for parameter in visual.parameters() if parameter.ndim == 4)
        if kind == torch.float32:  # a CPU may lack the others
            with torch.no_grad():
                visual.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"the image tower of {name} cannot take images of {image_size} pixels: {reason[:200]}\n"
            "Omit --backbone.image_size."
        ) from None
