"""Files of token statistics: means and variances of the image tokens of a source data set, per layer and position.

PromptAlign's published statistics are two files of ``torch.save``, each one tensor ``[L, T, W]``
(jameelhassan/PromptAlign, trainers/prompt_align.py 582-583). A safetensors file with both is also read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlprompt._files import home_path
from vlprompt.errors import ConfigError

MEAN, VARIANCE = "source_mean", "source_variance"


def read_statistics(paths: Sequence[str | Path], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[L, T, W]``, float32, of the first L layers.

    Args:
        paths: One safetensors file with ``source_mean`` and ``source_variance``, or two files of one tensor each, the
            means first.
        shape: L, T and W. The files may have further layers.

    Raises:
        ConfigError: A file is missing, holds anything but such tensors, or they do not fit.
    """
    files = [home_path(path) for path in paths]
    if len(files) == 1:
        tensors = _read(files[0], load_file)
        found = [tensors.get(name) if isinstance(tensors, dict) else None for name in (MEAN, VARIANCE)]
        files *= 2
    elif len(files) == 2:
        found = [_read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True)) for path in files]
    else:
        raise ConfigError(
            f"data.statistics names {len(files)} files; accepted: one safetensors file with {MEAN} and {VARIANCE}, or "
            "two files of one tensor each, [MEANS.pt, VARIANCES.pt]"
        )
    layers, *rest = shape
    checked = []
    for name, path, value in zip((MEAN, VARIANCE), files, found, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = "nothing" if value is None else f"a {type(value).__name__}"
            raise ConfigError(
                f"data.statistics: {path} holds {kind} as {name}; accepted: a tensor [L, T, W] of numbers"
            )
        if value.ndim != 3 or list(value.shape[1:]) != rest or len(value) < layers:
            raise ConfigError(
                f"data.statistics: {name} in {path} has shape {list(value.shape)}; accepted: at least {layers} layers "
                f"of {rest[0]} tokens of width {rest[1]}, those of the backbone with the prompts of the start"
            )
        value = value[:layers].float().contiguous()
        if not bool(value.isfinite().all()) or (name == VARIANCE and bool((value < 0).any())):
            raise ConfigError(f"data.statistics: {name} in {path} has values that are not finite or negative variances")
        checked.append(value)
    return checked[0], checked[1]


def _read(path: Path, load: object) -> object:
    if not path.is_file():
        raise ConfigError(f"data.statistics: there is no file {path}")
    try:
        return load(path)  # type: ignore[operator]
    except Exception as error:  # both libraries raise many kinds of errors
        kinds = "a safetensors file" if load is load_file else "a file of torch.save with one tensor"
        raise ConfigError(f"data.statistics: {path} is not {kinds}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
