"""The small CLIPs inside the package: restoring whole state dicts from compact files.

Two networks share one text tower: ``demo`` (a ViT, which accepts image tokens as prompts) and ``demo-rn`` (a ResNet,
which does not). MODEL_CARD.md in the same folder describes their training and limits.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vlprompt._files import parse_json, read_text
from vlprompt.backbone.weights import read_weights

DEMOS = ("demo", "demo-rn")
_SCALE, _VOCABULARY = ".scale", 49408
_LARGEST_SETTINGS = 2**20


def read_demo(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Return the configuration, weights and trained token ids of a demo network.

    Args:
        name: ``demo`` or ``demo-rn``.

    Raises:
        BackboneError: The files inside the package are damaged.
    """
    with resources.as_file(resources.files("vlprompt") / "assets" / "demo_clip") as folder:
        settings = parse_json(read_text(folder / f"{name}.json", _LARGEST_SETTINGS))
        stored = read_weights(folder / "demo.safetensors")
        if name != "demo":  # the file holds only an image tower
            texts = {key: value for key, value in stored.items() if not key.startswith("visual.")}
            stored = texts | read_weights(folder / f"{name}.safetensors")
    return settings, *full_state(stored)


def full_state(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return float32 weights and the trained token ids of a compact file.

    Matrices are stored as 8-bit rows with their scales (``NAME.scale``, ``[rows]``). The token table omits tokens that
    were never trained; their rows become zeros.
    """
    state = {}
    for name, tensor in stored.items():
        scale = stored.get(name + _SCALE)
        if scale is not None:
            tensor = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        if not name.endswith(_SCALE):
            state[name] = tensor
    token_ids = state.pop("token_ids").long()
    rows = state["token_embedding.weight"]
    table = torch.zeros(_VOCABULARY, rows.shape[1], dtype=rows.dtype)
    state["token_embedding.weight"] = table.index_copy_(0, token_ids, rows)
    return state, token_ids
