"""Values that are not finite: no method scores or saves them, whatever learned, fitted or averaged them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from tests.methods.test_every_method import LABELS, every_method, make
from vlprompt._finite import check_finite, not_finite
from vlprompt.backbone import Backbone
from vlprompt.config.run import RecipeConfig, TrainerConfig
from vlprompt.engine.fit import fit, make_trainer
from vlprompt.engine.metrics import checked_logits
from vlprompt.engine.module import PromptModule
from vlprompt.errors import DataError, NotFiniteError
from vlprompt.io.head import Head
from vlprompt.methods import PromptMethod
from vlprompt.methods.fitted import FittedMethod


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_head_is_saved(
    value: float, tiny_backbone: Backbone, name: str, own: Mapping[str, Any], tmp_path: Path
) -> None:
    method = make(tiny_backbone, name, own)
    learned = [tensor for tensor in method._kept().values() if tensor.numel()]
    if not learned:
        pytest.skip(f"{name} keeps nothing before it is fitted")
    with torch.no_grad():
        learned[0].view(-1)[0] = value
    with pytest.raises(NotFiniteError, match="not finite"):
        Head(method).save_pretrained(tmp_path / "head")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> torch.Tensor:
    return torch.from_numpy(tiny_clip.draw_images("every method", 6, 64))


class Spoil(pl.Callback):
    """Makes a learned value infinite at the end of the second epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PromptModule)
        if trainer.current_epoch == 1:
            pl_module.method.trainable_parameters()[-1][1].data.view(-1)[0] = torch.inf


def trained(method: PromptMethod, images: torch.Tensor, folder: Path, lr: float, *callbacks: pl.Callback) -> None:
    """Train for three epochs of one batch, and save the head if nothing is raised."""
    trainer = make_trainer(TrainerConfig(accelerator="cpu", progress=False), folder, 3, callbacks=callbacks)
    data = pl.LightningDataModule.from_datasets(TensorDataset(images, LABELS), batch_size=len(images))
    module = PromptModule(method, RecipeConfig(epochs=3, lr=lr))
    fit(trainer, module, data, folder)
    with torch.no_grad():
        checked_logits(module.eval()(images), method.name)
    Head(method).save_pretrained(folder / "head")


def learner(backbone: Backbone, name: str, own: Mapping[str, Any]) -> PromptMethod:
    """The method ``name``; the test is skipped if it takes no gradient steps."""
    method = make(backbone, name, own)
    if not method.parameter_groups(0.01):
        pytest.skip(f"{name} takes no gradient steps")
    return method


@every_method
def test_the_last_finite_epoch_of_a_training_is_kept(
    tiny_backbone: Backbone, name: str, own: Mapping[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    method = learner(tiny_backbone, name, own)
    culprit = method.trainable_parameters()[-1][0]
    with pytest.raises(NotFiniteError, match=rf"epoch 1 of {name} .*not finite") as caught:
        trained(method, images, tmp_path, 0.01, Spoil())
    assert culprit in str(caught.value) and "--recipe.lr" in str(caught.value)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0 and not not_finite(kept["state_dict"]) and not (tmp_path / "head").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@every_method
def test_a_training_that_diverges_saves_nothing_that_is_not_finite(
    tiny_backbone: Backbone, name: str, own: Mapping[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    method = learner(tiny_backbone, name, own)
    try:
        trained(method, images, tmp_path, 1e38)
    except NotFiniteError as error:
        assert name in str(error) or "loss is not finite" in str(error)
        assert not (tmp_path / "head").exists()
    else:
        assert not not_finite(load_file(tmp_path / "head" / "head.safetensors"))
    for path in tmp_path.glob("last.ckpt"):
        assert not not_finite(torch.load(path, weights_only=True)["state_dict"])


@every_method
def test_features_that_are_not_finite_are_not_fitted(
    tiny_backbone: Backbone, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    if not isinstance(method, FittedMethod):
        pytest.skip(f"{name} is not fitted")
    features = torch.randn(10, tiny_backbone.embed_dim, generator=torch.Generator().manual_seed(0))
    features[3, 0] = float("nan")
    labels = torch.arange(10) % 5
    with pytest.raises((DataError, NotFiniteError), match="not finite"):
        method.cache.fit(features, labels)
    assert not not_finite(method.trained_state())


def test_scores_that_are_not_finite_are_no_scores() -> None:
    logits = torch.zeros(3, 4)
    assert checked_logits(logits, "coop") is logits
    logits[1, 2] = float("nan")
    with pytest.raises(NotFiniteError, match="scores of 1 of 3 images by coop are not finite"):
        checked_logits(logits, "coop")


def test_the_culprit_is_named() -> None:
    tensors = {
        "a": torch.ones(2),
        "b": torch.tensor([1.0, torch.inf, torch.nan]),
        "c": torch.ones(2, dtype=torch.uint8),
    }
    with pytest.raises(NotFiniteError, match=r"^here gave values .*:\n  - b: 2 of 3 values are not finite\ndo this$"):
        check_finite(tensors, "here", "do this")
