"""The check of shape and type of tensors at the entry of public functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlprompt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

#: Sizes of a shape: a number, or a letter for any size.
Shape = tuple[int | str, ...]


def check_shape(tensor: Tensor, what: str, *accepted: Shape, hint: str = "") -> None:
    """Raise DataError unless ``tensor`` holds floats and has one of the ``accepted`` shapes.

    Args:
        tensor: What was given.
        what: Its name, a plural, for the message.
        accepted: Shapes such as ``("B", 3, 224, 224)``.
        hint: A sentence that ends the message.
    """
    shape: Any = getattr(tensor, "shape", None)
    if shape is not None and tensor.is_floating_point():
        for sizes in accepted:
            if len(sizes) == len(shape) and all(
                isinstance(size, str) or size == given for size, given in zip(sizes, shape, strict=True)
            ):
                return
    kind = f"a {type(tensor).__name__}" if shape is None else f"{list(shape)} of {tensor.dtype}"
    shapes = " or ".join(f"[{', '.join(map(str, sizes))}]" for sizes in accepted)
    raise DataError(f"{what} are {kind}; accepted: floats {shapes}{hint and '. '}{hint}")
