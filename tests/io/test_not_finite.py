"""Files with right checksums and values that are not finite: loaders refuse them, the feature store ignores them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlprompt import create_method, load_head
from vlprompt._files import file_checksum
from vlprompt.backbone import Backbone
from vlprompt.data.features import FeatureStore, Rows, _sha256
from vlprompt.errors import NotFiniteError, VlpromptError
from vlprompt.io import regulators
from vlprompt.io.head import Head, learned_tensors
from vlprompt.io.statistics import read_statistics
from vlprompt.io.teachers import method_of
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.methods import PromptMethod

VALUES = [float("nan"), float("inf")]


def spoil(path: Path, value: float) -> None:
    """Set the first value of the first tensor of a safetensors file, and correct the checksum in its metadata."""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}
    first = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    first.view(-1)[0] = value
    if "sha256" in metadata:
        metadata["sha256"] = (_sha256 if "key" in metadata else regulators._sha256)(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def method(tiny_backbone: Backbone) -> PromptMethod:
    return create_method("coop", tiny_backbone, ["cat", "dog"], context_init="a photo of a")


def spoiled_head(method: PromptMethod, folder: Path, value: float) -> Path:
    Head(method).save_pretrained(folder)
    spoil(folder / "head.safetensors", value)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "tensors_sha256": file_checksum(folder / "head.safetensors")})
    )
    return folder


def spoiled_regulator(method: PromptMethod, folder: Path, value: float) -> Path:
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    regulator = Regulator(shapes, method.backbone.embed_dim, RegulatorSettings("rescale-gate", gate_bias=1.0))
    Head(method).save_pretrained(folder)
    spoil(regulators.save_regulator(regulator, folder, "0" * 64), value)
    return folder


def spoiled_statistics(method: PromptMethod, folder: Path, value: float) -> Path:
    save_file({"source_mean": torch.zeros(2, 3, 4), "source_variance": torch.ones(2, 3, 4)}, folder)
    spoil(folder, value)
    return folder


LOADERS: dict[str, tuple[Callable[[PromptMethod, Path, float], Path], Callable[[Path, PromptMethod], object]]] = {
    "a head": (spoiled_head, lambda path, method: load_head(path, method.backbone)),
    "a run that initialises another": (spoiled_head, lambda path, method: learned_tensors(path, method.backbone)),
    "a teacher": (spoiled_head, lambda path, method: method_of(path, method.backbone)),
    "a regulator": (spoiled_regulator, regulators.load_regulator),
    "statistics": (spoiled_statistics, lambda path, method: read_statistics([path], (2, 3, 4))),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_is_not_finite_is_refused(name: str, value: float, method: PromptMethod, tmp_path: Path) -> None:
    write, load = LOADERS[name]
    path = write(method, tmp_path / "file", value)
    with pytest.raises(VlpromptError, match="not finite"):
        load(path, method)


@pytest.mark.parametrize("kind", ["rescale-gate", "sigmoid-gate"])
def test_no_regulator_is_saved(kind: str, method: PromptMethod, tmp_path: Path) -> None:
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    regulator = Regulator(shapes, method.backbone.embed_dim, RegulatorSettings(kind))
    with torch.no_grad():
        next(iter(regulator.parameters())).view(-1)[0] = torch.nan
    with pytest.raises(NotFiniteError, match="meta-training gave values that are not finite"):
        regulators.save_regulator(regulator, tmp_path, "0" * 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", VALUES)
def test_a_stored_feature_that_is_not_finite_is_computed_again(value: float, tmp_path: Path) -> None:
    key, features = {"x": 1}, torch.ones(3, 2)
    FeatureStore(tmp_path).get(key, lambda: features)
    spoil(FeatureStore(tmp_path).path(key), value)
    with pytest.warns(UserWarning, match="damaged; they are computed again"):
        assert torch.equal(FeatureStore(tmp_path).get(key, lambda: features), features)


def test_stored_features_of_another_number_of_images_are_computed_again(tmp_path: Path) -> None:
    key, features = {"x": 1}, torch.ones(3, 2)
    FeatureStore(tmp_path).get(key, lambda: features[:2])
    with pytest.warns(UserWarning, match="damaged; they are computed again"):
        rows = FeatureStore(tmp_path).rows(key, lambda: Rows(features), number=3)
    assert torch.equal(rows.features, features)


def test_a_feature_that_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(NotFiniteError, match="features: 1 of 6 values"):
        store.get({"x": 1}, lambda: torch.tensor([[1.0, torch.nan, 1.0, 1.0, 1.0, 1.0]]))
    assert not list(tmp_path.glob("*.safetensors"))
