"""The length of a training in a user's Trainer: schedule, work at the end, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import vlprompt
from tests.engine.test_module import Rates, plain_loader
from vlprompt.config.run import RecipeConfig
from vlprompt.datasets import FewShotTask
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import ConfigError, NotFiniteError
from vlprompt.methods import PromptMethod

Make = Callable[..., PromptMethod]
Trainers = Callable[..., pl.Trainer]


class StopAfter(pl.Callback):
    """Stops a training at the end of an epoch, as early stopping does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


@pytest.mark.parametrize("epochs", [2, 6])
def test_the_schedule_follows_the_trainer(
    epochs: int, make_method: Make, user_trainer: Trainers, task: FewShotTask
) -> None:
    """The rate of recipe.epochs fell to 0 before the end of a longer training, and rose again."""
    method, recipe, rates = make_method("coop"), RecipeConfig(epochs=3), Rates()
    with pytest.warns(UserWarning, match=f"recipe.epochs is 3, and the Trainer trains for {epochs} epochs"):
        user_trainer(max_epochs=epochs, callbacks=[rates]).fit(
            vlprompt.PromptModule(method, recipe), plain_loader(method, task)
        )
    expected = [learning_rate(epoch, recipe.lr, RecipeConfig(epochs=epochs)) for epoch in range(epochs)]
    assert [seen[0] for seen in rates.seen] == pytest.approx(expected, rel=1e-12)


def test_a_training_without_a_limit_is_refused(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    method = make_method("coop")
    with pytest.raises(
        ConfigError, match="no limit of epochs .*max_epochs or max_steps of the Trainer, or recipe.steps"
    ):
        user_trainer(max_epochs=-1).fit(vlprompt.PromptModule(method), plain_loader(method, task))


def test_early_stopping_ends_with_the_average(make_method: Make, user_trainer: Trainers, task: FewShotTask) -> None:
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            kept.append(pl_module.method.trained_state())

    plain = make_method("coop")
    averaged = vlprompt.create_method(
        "coop", plain.backbone, task.class_names, context_init="a photo of a", objectives={"aggregation": {"mean": 2.0}}
    )
    trainer = user_trainer(max_epochs=9, callbacks=[Keep(), StopAfter(2)])
    trainer.fit(vlprompt.PromptModule(averaged), plain_loader(averaged, task))
    weights = torch.tensor([-0.5, 0.0, -0.5]).exp()
    expected = sum(w * state["prompt.ctx"] for w, state in zip(weights / weights.sum(), kept, strict=True))
    torch.testing.assert_close(averaged.trained_state()["prompt.ctx"], expected)


def test_a_tensor_that_is_no_longer_finite_ends_the_training_before_the_checkpoint(
    make_method: Make, user_trainer: Trainers, task: FewShotTask, tmp_path: Any
) -> None:
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                next(iter(pl_module.method.trainable_parameters()))[1].data[0] = float("inf")

    method = make_method("coop")
    saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    trainer = user_trainer(max_epochs=4, callbacks=[Break(), saved])
    with pytest.raises(NotFiniteError, match=r"epoch 1 of coop .*\n  - prompt.ctx: "):
        trainer.fit(vlprompt.PromptModule(method), plain_loader(method, task))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["epoch"] == 0 and all(value.isfinite().all() for value in state["state_dict"].values())
