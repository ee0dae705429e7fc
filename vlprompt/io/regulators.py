"""The safetensors file of a meta-learned gradient regulator, with its settings in the metadata."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprompt._files import parse_json, replacing, sha256_tensors
from vlprompt._finite import check_finite, not_finite
from vlprompt._random import restored_random
from vlprompt.errors import HeadError, VlpromptError, bulleted
from vlprompt.io.head_files import find_head, read_config
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.methods import PromptMethod

REGULATOR_FILE = "regulator.safetensors"
SCHEMA = "vlprompt regulator 1"


def save_regulator(regulator: Regulator, folder: Path, inputs_sha256: str) -> Path:
    """Write ``folder/regulator.safetensors`` atomically and return it.

    Args:
        regulator: The regulator.
        folder: The folder of its meta-training.
        inputs_sha256: Hash of the inputs of the meta-training, which its head records, too.

    Raises:
        NotFiniteError: A learned value is NaN, or infinite without an infinite ``gate_bias``.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in regulator.state_dict().items()}
    settings = {**dataclasses.asdict(regulator.settings), "gate_bias": str(regulator.settings.gate_bias)}  # or "inf"
    check_finite(_learned(tensors, regulator.settings), "meta-training", f"No regulator was saved in {folder}.")
    metadata = {
        "schema": SCHEMA,
        "settings": json.dumps(settings),
        "shapes": json.dumps(regulator.shapes),
        "embed_dim": str(regulator.embed_dim),
        "inputs_sha256": inputs_sha256,
        "sha256": _sha256(tensors),
    }
    with replacing(folder / REGULATOR_FILE) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return folder / REGULATOR_FILE


def load_regulator(folder: str | Path, method: PromptMethod) -> Regulator:
    """Return the regulator that a meta-training saved in ``folder``, for the prompts of ``method``.

    Raises:
        HeadError: The file is missing, damaged or foreign, or belongs to other prompts, or to another
            meta-training than the head in ``folder``.
    """
    path = Path(folder) / REGULATOR_FILE
    if not path.is_file():
        raise HeadError(
            f"{folder} holds no {REGULATOR_FILE}; gram:RUN needs the folder of a finished meta-training with a "
            f"regulator. To use only its initialisation: --init_from {folder}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("schema") != SCHEMA or metadata.get("sha256") != _sha256(tensors):
            raise HeadError(f"{path} is damaged, or not a regulator of vlprompt; meta-train again")
        own = read_config(find_head(folder)).training.get("inputs_sha256")
        if own is not None and metadata.get("inputs_sha256", own) != own:
            raise HeadError(f"{path} is of another meta-training than the head in {folder}; meta-train again")
        settings, shapes = parse_json(metadata["settings"]), parse_json(metadata["shapes"])
        settings["gate_bias"] = float(settings["gate_bias"])  # may be infinite
        _check_shapes(shapes, method, path)
        with restored_random():
            regulator = Regulator(shapes, int(metadata["embed_dim"]), RegulatorSettings(**settings))
        regulator.load_state_dict(tensors)
        if lines := not_finite(_learned(tensors, regulator.settings)):
            raise HeadError(f"{path} holds values that are not finite; meta-train again:\n{bulleted(lines, limit=6)}")
    except VlpromptError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise HeadError(f"{path} cannot be read ({type(error).__name__}); it is damaged: meta-train again") from error
    if regulator.embed_dim != method.backbone.embed_dim:
        raise HeadError(
            f"{path} was trained with features of size {regulator.embed_dim}, but {method.backbone.name} has "
            f"{method.backbone.embed_dim}"
        )
    return regulator.requires_grad_(False)


def _check_shapes(shapes: Mapping[str, Any], method: PromptMethod, path: Path) -> None:
    expected = {name: list(prompt.shape) for name, prompt in method.prompt_tensors()}
    names = [*expected, *(name for name in shapes if name not in expected)]
    wrong = [
        f"{name}: {shapes.get(name, 'none')} in the file, {expected.get(name, 'none')} in {method.name}"
        for name in names
        if shapes.get(name) != expected.get(name)
    ]
    if wrong:
        raise HeadError(
            f"{path} does not match the prompts of this {method.name}:\n{bulleted(wrong, limit=8)}\n"
            "Use the method and settings of the meta-training."
        )


def _learned(tensors: Mapping[str, Tensor], settings: RegulatorSettings) -> dict[str, Tensor]:
    """Return ``tensors`` without the biases of gates that start wide open, which are infinite."""
    opened = math.isinf(settings.gate_bias)
    return {name: value for name, value in tensors.items() if not (opened and name.endswith("gate.bias"))}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return sha256_tensors(tensors, lambda name, tensor: f"{name} {tuple(tensor.shape)}\n")
