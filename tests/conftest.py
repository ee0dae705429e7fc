"""Shared by all tests: the miniature CLIP of ``tests/golden/tiny_clip.py`` and the archives computed with it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# Tests must not reach for the network, nor find weights that happen to lie on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip() -> ModuleType:
    """The module ``tests/golden/tiny_clip.py``: ``TinyClipDims``, ``build_state_dict``, ``checksum``, ``draw``."""
    spec = importlib.util.spec_from_file_location("tiny_clip", GOLDEN / "tiny_clip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_clip"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_state_dict(tiny_clip: ModuleType) -> Callable[..., dict[str, torch.Tensor]]:
    """``tiny_state_dict(seed=0, archive_fields=False, **dims)``: fresh OpenAI-format tensors by the golden rule."""
    kept: dict[Any, dict[str, torch.Tensor]] = {}

    def build(seed: int = 0, archive_fields: bool = False, **dims: int) -> dict[str, torch.Tensor]:
        key = (seed, archive_fields, tuple(sorted(dims.items())))
        if key not in kept:
            sizes = tiny_clip.TinyClipDims(**dims)
            kept[key] = tiny_clip.build_state_dict(sizes, seed, archive_fields=archive_fields)
        return {name: tensor.clone() for name, tensor in kept[key].items()}

    return build


@pytest.fixture(scope="session")
def tiny_backbone(tiny_state_dict: Callable[..., dict[str, torch.Tensor]]) -> Any:
    """The miniature CLIP of the golden archives (default dimensions, seed 0) as a backbone. Frozen: share it."""
    from vlprompt.backbone import Backbone

    return Backbone.from_state_dict(tiny_state_dict(), name="tiny")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """``golden("vpt")``: the arrays of ``tests/golden/vpt.npz`` as tensors, and its metadata."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            meta = json.loads(archive["meta"].item())
            arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        return arrays, meta

    return read


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``max|x - reference| / max|reference|``, the golden archives' measure."""

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        assert value.shape == reference.shape
        return float((value.detach() - reference).abs().max() / reference.abs().max())

    return error
