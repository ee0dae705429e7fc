"""PromptModule in a user's Trainer: training, logging, clipping, checkpoints and refusals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vlprompt
from vlprompt.config.run import RecipeConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask
from vlprompt.engine.metrics import MultilabelScores
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import ConfigError, HeadError, NotFiniteError
from vlprompt.methods import PromptMethod

Make = Callable[..., PromptMethod]
Trainers = Callable[..., pl.Trainer]


class Rates(pl.Callback):
    """Records the rates of all groups at the start of every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def plain_loader(method: PromptMethod, task: FewShotTask, batch_size: int = 4) -> DataLoader[Any]:
    """Return a loader of plain (images, labels) pairs."""
    size = method.backbone.preprocess.size
    images = torch.randn(len(task.train), 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([sample.label for sample in task.train])
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


@pytest.mark.parametrize("name", ["coop", "mocoop"])
def test_user_trainer_with_few_shot_data(
    name: str, make_method: Make, user_trainer: Trainers, task: FewShotTask, tmp_path: Path
) -> None:
    method = make_method(name)
    before = {key: value.clone() for key, value in method.backbone.state_dict().items()}
    start = method.trained_state()
    data = FewShotData(task, method.backbone.preprocess, batch_size=4, test_batch_size=5)
    trainer = user_trainer()
    module = vlprompt.PromptModule(method, RecipeConfig(epochs=2))
    trainer.fit(module, datamodule=data)
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 100  # on the task's validation images
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    assert (scores["test/total"], scores["test/correct"]) == (17, round(scores["test/accuracy"] * 0.17))
    after = method.backbone.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in method.backbone.parameters())
    assert not method.backbone.model.training
    changed = {key for key, value in method.trained_state().items() if not torch.equal(value, start[key])}
    assert changed == {key for key, value in start.items() if value.numel()}


def test_user_trainer_with_plain_pairs(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("mocoop")
    loader = plain_loader(method, task)
    module = vlprompt.PromptModule(method, RecipeConfig(epochs=2))
    trainer = user_trainer()
    trainer.fit(module, loader)
    assert trainer.global_step == 6
    assert set(trainer.callback_metrics) >= {"train/loss", "train/ce", "train/text", "train/gate"}
    (scores,) = trainer.test(module, loader, verbose=False)
    assert scores["test/total"] == 12


def test_features_in_place_of_images(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    by_images, by_features = make_method("coop"), make_method("coop")
    images = plain_loader(by_images, task)
    pixels, labels = images.dataset.tensors  # type: ignore[attr-defined]
    features = DataLoader(TensorDataset(by_images.backbone.encode_image(pixels), labels), batch_size=4)
    for method, loader in ((by_images, images), (by_features, features)):
        user_trainer().fit(vlprompt.PromptModule(method, RecipeConfig(epochs=2)), loader)
    torch.testing.assert_close(by_images.trained_state(), by_features.trained_state(), rtol=1e-5, atol=1e-7)


def test_loss_is_the_sum_of_its_terms(make_method: Make, task: FewShotTask) -> None:
    method = make_method("mocoop")
    module = vlprompt.PromptModule(method)
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[assignment,method-assign]
    module.log = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    images, labels = next(iter(plain_loader(method, task)))
    loss = module.training_step({"images": images, "labels": labels, "scale": torch.tensor(0.5)}, 0)
    assert set(logged) == {"train/loss", "train/ce", "train/text", "train/gate"}
    terms = [value for name, value in logged.items() if name != "train/loss"]
    assert float(logged["train/loss"]) == pytest.approx(float(sum(terms)), rel=1e-6)
    assert loss.item() == pytest.approx(float(logged["train/loss"]), rel=1e-6)  # both include the scale
    assert not any(value.requires_grad for value in logged.values())


def test_rates_of_two_groups(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("mocoop", tune_layer_norms=True, layer_norm_lr_factor=0.1)
    recipe = RecipeConfig(epochs=4, lr=0.01)
    rates = Rates()
    user_trainer(max_epochs=4, callbacks=[rates]).fit(vlprompt.PromptModule(method, recipe), plain_loader(method, task))
    expected = [[learning_rate(epoch, lr, recipe) for lr in (0.01, 0.001)] for epoch in range(4)]
    for seen, wanted in zip(rates.seen, expected, strict=True):
        assert seen == pytest.approx(wanted, rel=1e-12)
    assert rates.seen[0] == pytest.approx([1e-5, 1e-5])  # the warm-up rate is the same for both
    groups = method.parameter_groups(0.01)
    both = [id(p) for group in groups for p in group["params"]]
    assert sorted(both) == sorted(id(p) for _, p in method.trainable_parameters())


def test_a_group_with_rate_zero_does_not_change(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("mocoop", tune_layer_norms=True, layer_norm_lr_factor=0.0)
    norms = [value.clone() for value in method.image_overrides().values()]
    user_trainer().fit(vlprompt.PromptModule(method, RecipeConfig(epochs=2)), plain_loader(method, task))
    assert all(torch.equal(a, b) for a, b in zip(norms, method.image_overrides().values(), strict=True))


def test_default_optimiser_is_the_published_one(make_method: Make) -> None:
    optimizer = vlprompt.PromptModule(make_method("coop")).configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    options = {name: group[name] for name in ("momentum", "weight_decay", "dampening", "nesterov")}
    assert isinstance(optimizer, torch.optim.SGD)
    assert options == {"momentum": 0.9, "weight_decay": 5e-4, "dampening": 0, "nesterov": False}


@pytest.mark.parametrize("by_trainer", [False, True])
def test_gradient_clip(by_trainer: bool, make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method, norm = make_method("mocoop"), 1e-3
    start = method.trained_state()
    clip = 1e9 if by_trainer else norm
    recipe = RecipeConfig(epochs=1, lr=1.0, warmup_epochs=0, momentum=0, weight_decay=0, gradient_clip=clip)
    trainer = user_trainer(max_epochs=1, limit_train_batches=1, gradient_clip_val=norm if by_trainer else None)
    trainer.fit(vlprompt.PromptModule(method, recipe), plain_loader(method, task))
    scale = {name: 0.1 if "norms" in name else 1.0 for name in start}  # the groups' rates
    steps = [(value - start[name]) / scale[name] for name, value in method.trained_state().items()]
    assert math.sqrt(sum(float(step.double().square().sum()) for step in steps)) == pytest.approx(norm, rel=1e-2)


def test_loss_that_is_not_finite_names_the_fix(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("coop")
    method.load_trained_state({name: value * float("nan") for name, value in method.trained_state().items()})
    with pytest.raises(
        NotFiniteError, match=r"not finite in epoch 0 \(ce nan\).*--recipe.lr.*--trainer.precision 32-true"
    ):
        user_trainer().fit(vlprompt.PromptModule(method), plain_loader(method, task))


def test_method_with_nothing_to_train_is_refused(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("zeroshot")
    with pytest.raises(ConfigError, match="'zeroshot' has nothing to train"):
        user_trainer().fit(vlprompt.PromptModule(method), plain_loader(method, task))


def test_recipe_is_checked(make_method: Make) -> None:
    with pytest.raises(ConfigError, match=r"recipe.lr is -1.*\n?.*") as caught:
        vlprompt.PromptModule(make_method("coop"), RecipeConfig(lr=-1, momentum=2))
    assert "recipe.momentum is 2" in str(caught.value)


def test_checkpoint_holds_trainable_parameters_and_needs_no_unpickling(
    make_method: Make, user_trainer: Trainers, task: FewShotTask, tmp_path: Path
) -> None:
    method = make_method("mocoop")
    module = vlprompt.PromptModule(method, RecipeConfig(epochs=2))
    trainer = user_trainer()
    trainer.fit(module, plain_loader(method, task))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    names = {f"method.{name}" for name, _ in method.trainable_parameters()}
    assert set(checkpoint["state_dict"]) == names == set(module.state_dict())
    fresh = vlprompt.PromptModule(make_method("mocoop"))
    fresh.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(fresh.method.trained_state(), method.trained_state(), rtol=0, atol=0)
    assert (tmp_path / "own.ckpt").stat().st_size < 20 * sum(
        p.numel() for _, p in method.trainable_parameters()
    ) + 50_000


def test_resuming_with_a_user_trainer_is_exact(
    make_method: Make, user_trainer: Trainers, task: FewShotTask, tmp_path: Path
) -> None:
    whole, again = make_method("coop"), make_method("coop")
    data = FewShotData(task, whole.backbone.preprocess, batch_size=4)
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    user_trainer(max_epochs=3, callbacks=[every]).fit(vlprompt.PromptModule(whole), datamodule=data)
    user_trainer(max_epochs=3).fit(
        vlprompt.PromptModule(again), datamodule=data, ckpt_path=str(tmp_path / "epoch=1.ckpt"), weights_only=True
    )
    torch.testing.assert_close(again.trained_state(), whole.trained_state(), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_mismatched_state_is_refused(change: str, make_method: Make) -> None:
    module = vlprompt.PromptModule(make_method("coop"))
    state = module.state_dict()
    if change == "missing":
        state.clear()
    elif change == "unknown":
        state["method.other"] = torch.zeros(1)
    else:
        state["method.prompt.ctx"] = torch.zeros(1, 2)
    with pytest.raises(HeadError, match="(?s)the checkpoint does not fit.*(ctx|other)"):
        module.load_state_dict(state)


def test_accuracy_is_exact(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("coop")
    data = FewShotData(task, method.backbone.preprocess, test_batch_size=4)
    (scores,) = user_trainer().test(vlprompt.PromptModule(method), datamodule=data, verbose=False)
    data.setup("test")
    with torch.no_grad():
        hits = sum(int((method(b["images"]).argmax(-1) == b["labels"]).sum()) for b in data.test_dataloader())
    assert (scores["test/correct"], scores["test/total"]) == (hits, 17)
    assert scores["test/accuracy"] == pytest.approx(100 * hits / 17)


# -- other metrics --------------------------------------------------------------------------------------------------
def test_mean_per_class_counts_every_class_once(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("coop")
    data = FewShotData(task, method.backbone.preprocess, test_batch_size=4)
    module = vlprompt.PromptModule(method, metric="mean_per_class")
    (scores,) = user_trainer().test(module, datamodule=data, verbose=False)
    assert sum(module.per_class.correct) == scores["test/correct"]
    assert module.per_class.total == [3, 3, 3, 3, 3, 2]  # the last class has one image less
    accuracies = [a / b for a, b in zip(module.per_class.correct, module.per_class.total, strict=True)]
    assert scores["test/mean_per_class"] == pytest.approx(100 * sum(accuracies) / 6)


def several_labels(method: PromptMethod, task: FewShotTask) -> DataLoader[Any]:
    """Return a loader of (images, multi-hot labels) pairs; every image has its class and the next one."""
    images, labels = plain_loader(method, task).dataset.tensors  # type: ignore[attr-defined]
    hot = torch.nn.functional.one_hot(labels, 6) + torch.nn.functional.one_hot((labels + 1) % 6, 6)
    return DataLoader(TensorDataset(images, hot.float()), batch_size=5)


def test_several_labels_are_ranked(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("zeroshot")
    loader = several_labels(method, task)
    (scores,) = user_trainer().test(vlprompt.PromptModule(method, metric="map"), loader, verbose=False)
    reference = MultilabelScores(6)
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        reference.update(method(images), labels)
    assert {name.removeprefix("test/"): value for name, value in scores.items()} == pytest.approx(
        {name: float(value) for name, value in reference.score()[0].items()}
    )
    assert scores["test/total"] == 12


def test_cross_entropy_is_not_trained_on_several_labels(
    make_method: Make, user_trainer: Trainers, task: FewShotTask
) -> None:
    method = make_method("coop")
    with pytest.raises(ConfigError, match="'coop' is trained by cross-entropy over one label.*--method zeroshot"):
        user_trainer().fit(vlprompt.PromptModule(method, metric="map"), several_labels(method, task))
