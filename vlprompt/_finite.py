"""The check that learned, fitted and averaged tensors are finite before they are scored or saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlprompt.errors import NotFiniteError, bulleted

if TYPE_CHECKING:
    from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each of ``tensors`` that holds NaN or infinity: its name and the number of these values."""
    lines = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((finite := tensor.isfinite()).all()):
            lines.append(f"{name}: {finite.numel() - int(finite.sum())} of {finite.numel()} values are not finite")
    return lines


def check_finite(tensors: Mapping[str, Tensor], where: str, fix: str) -> None:
    """Raise NotFiniteError if one of ``tensors`` holds NaN or infinity.

    Args:
        tensors: By name.
        where: What was done to them, for the first line: ``"epoch 3 of coop"``.
        fix: What to change, for the last line.
    """
    if lines := not_finite(tensors):
        raise NotFiniteError(f"{where} gave values that are not finite:\n{bulleted(lines, limit=6)}\n{fix}")
