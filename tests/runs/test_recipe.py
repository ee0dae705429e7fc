"""Recipes of whole runs: a length in steps, partial batches, and the epoch that the validation images choose."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import vlprompt
from tests.fixtures.processes import killed
from tests.fixtures.runs import tiny_run
from vlprompt.cli.main import main
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import load_dataset
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.module import PromptModule
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import ConfigError
from vlprompt.io.head import load_head
from vlprompt.protocols.search import candidates_of
from vlprompt.runs.dry_run import dry_run
from vlprompt.runs.folder import run_folder
from vlprompt.runs.run import complete, run, train, validate
from vlprompt.runs.tables import validation_text

Tiny = Callable[..., RunConfig]
STEPS = {"steps": 5, "batch_size": 4, "lr": 0.1, "schedule": "step", "warmup_steps": 2}
"""10 images in batches of 4: two whole epochs of 2 steps, and one step of a third; with the partial batch 3 and 2."""


@pytest.fixture
def chosen(validated_folder: Path, tmp_path: Path) -> Tiny:
    """``chosen("coop", ...)``: a short run whose epoch is chosen on validation images."""

    def make(method: str = "coop", /, **values: Any) -> RunConfig:
        defaults = {"select": "best_val", "epochs": 4, "lr": 2.0, "shots": 2}
        return tiny_run(validated_folder, tmp_path / "runs", method, **{**defaults, **values})

    return make


def train_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "results.json").read_text())["train"]
    return facts


class Steps(pl.Callback):
    """Records the rate and the number of images of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.images: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.images.append(len(batch["labels"]))


# -- steps ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("drop_last", "images"), [(True, [4] * 5), (False, [4, 4, 2, 4, 4])])
def test_steps_end_the_training_within_an_epoch(drop_last: bool, images: list[int], image_folder: Path) -> None:
    task = load_dataset("folder", root=image_folder, shots=2)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names)
    recipe = RecipeConfig(**STEPS, drop_last=drop_last)
    data = FewShotData(task, method.backbone.preprocess, batch_size=4, drop_last=drop_last)
    seen = Steps()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[seen],
        limit_val_batches=0,
    )
    trainer.fit(PromptModule(method, recipe), datamodule=data)
    assert trainer.global_step == 5
    assert seen.images == images
    per_epoch = recipe.steps_per_epoch(len(task.train))
    assert per_epoch == (2 if drop_last else 3)
    assert seen.rates == pytest.approx([learning_rate(step, 0.1, recipe, per_epoch) for step in range(5)])
    assert seen.rates[:3] == pytest.approx([0.05, 0.1, 0.1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_steps_says_so_in_its_files(accumulate: int, tiny: Tiny) -> None:
    config = tiny("coop", accumulate=accumulate, **{**STEPS, "steps": 3, "warmup_steps": 1})
    done = run(config)
    facts = done.results["train"]
    assert (facts["steps"], facts["epochs"]) == ((3, 2) if accumulate == 1 else (3, 3))
    assert len(read_metrics(done.folder / "metrics.jsonl")) == facts["epochs"]
    assert done.results["config"]["recipe"]["epochs"] is None
    assert (done.results["config"]["recipe"]["steps"], done.results["config"]["recipe"]["warmup_epochs"]) == (3, None)
    assert f"3 updates, 2 per epoch, in {facts['epochs']} epochs" in dry_run(config)


def test_steps_of_whole_epochs_train_as_those_epochs(tiny: Tiny) -> None:
    values = {"batch_size": 4, "lr": 0.1, "schedule": "step"}
    epochs, steps = run(tiny("coop", epochs=3, **values)), run(tiny("coop", steps=6, **values))
    first, second = (done.head().method.trained_state() for done in (epochs, steps))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert epochs.folder != steps.folder


def test_a_schedule_by_epoch_runs_over_the_epochs_of_the_steps(tiny: Tiny) -> None:
    rates = [line["lr"] for line in read_metrics(run(tiny("coop", steps=5, batch_size=4)).folder / "metrics.jsonl")]
    assert rates == pytest.approx([learning_rate(epoch, 0.002, RecipeConfig(epochs=3)) for epoch in range(3)])


@pytest.mark.parametrize("point", [("after", "last.ckpt", 2), ("after", "last.ckpt", 3), ("step", "", 5)])
def test_steps_are_resumed_exactly(point: tuple[str, str, int], tiny: Tiny, tmp_path: Path) -> None:
    whole = run(tiny("coop", output=str(tmp_path / "whole"), **STEPS))
    config = tiny("coop", **STEPS)
    killed(lambda: run(config), *point, step=(PromptModule, "training_step"))
    done = run(config)
    torch.testing.assert_close(done.head().method.trained_state(), whole.head().method.trained_state(), rtol=0, atol=0)
    assert (done.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()
    assert train_facts(done.folder)["steps"] == 5


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_skipped_images_do_not_shorten_the_training(image_folder: Path, tmp_path: Path) -> None:
    """Without 8 of 20 images an epoch has 3 steps, and 10 steps take 4 epochs in place of 2."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for path in sorted((folder / "train").glob("*/*.png"))[:8]:
        path.write_bytes(b"no image")
    values = {"transform": "random", "cached_views": 0, "shots": -1, "on_bad_image": "skip"}
    done = run(tiny_run(folder, tmp_path / "runs", steps=10, batch_size=4, schedule="step", **values))
    assert (done.results["train"]["steps"], done.results["train"]["epochs"]) == (10, 4)


def test_a_warm_up_longer_than_the_training_is_refused(tiny: Tiny) -> None:
    config = tiny("coop", epochs=2, batch_size=4, schedule="step", warmup_steps=5)
    for act in (run, dry_run):
        with pytest.raises(ConfigError, match="recipe.warmup_steps is 5, and the training has 4 steps; accepted: 0 to"):
            act(config)


def test_the_last_value_of_two_exclusive_keys_counts(image_folder: Path) -> None:
    def recipe(*words: str) -> RecipeConfig:
        return parse_run(["--method", "coop", *words]).recipe

    assert (recipe().epochs, recipe().steps) == (200, None)
    steps = recipe("--recipe.steps", "7")
    assert (steps.epochs, steps.steps, steps.warmup_epochs) == (None, 7, 1)
    warm = recipe("--recipe.warmup_steps", "7", "--recipe.schedule", "step")
    assert (warm.warmup_epochs, warm.warmup_steps, warm.warmup) == (None, 7, "linear")
    with pytest.raises(ConfigError, match="recipe.epochs is 3 and recipe.steps is 7; accepted: a number for one"):
        recipe("--recipe.steps", "7", "--recipe.epochs", "3")
    with pytest.raises(ConfigError, match="recipe.epochs is null and recipe.steps is null; accepted: a number for one"):
        recipe("--recipe.epochs", "null")
    task = load_dataset("folder", root=image_folder, shots=2)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names)
    with pytest.raises(ConfigError, match="recipe.steps is 0; accepted: a whole number of 1 or more, or null"):
        train(method, task, steps=0)
    candidates = candidates_of(complete(parse_run(["--method", "coop"])), {"recipe.steps": [5, 6]})
    assert [(each.recipe.epochs, each.recipe.steps) for _, each in candidates] == [(None, 5), (None, 6)]


def test_train_takes_steps_in_place_of_the_methods_epochs(image_folder: Path, tmp_path: Path) -> None:
    task = load_dataset("folder", root=image_folder, shots=1)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names)
    done = train(method, task, output=str(tmp_path), transform="center", steps=2)
    assert (done.results["train"]["steps"], done.results["config"]["recipe"]["epochs"]) == (2, None)


def test_runs_keep_the_folders_of_earlier_versions(tiny: Tiny) -> None:
    config = tiny("coop")
    old = {name: value for name, value in dataclasses.asdict(config.recipe).items() if name in OLD_KEYS}
    assert set(OLD_KEYS) | set(NEW_KEYS) == set(dataclasses.asdict(config.recipe))
    assert RecipeConfig(**old) == config.recipe
    changes: list[dict[str, Any]] = [{}, {"drop_last": False}, {"select": "best_val"}, LINEAR]
    changes += [{"steps": 100}, {"validate_every": 1}]
    folders = [run_folder(complete(tiny("coop", **change))) for change in changes]
    assert len(set(folders)) == 6


LINEAR = {"warmup_epochs": 2, "warmup": "linear"}
OLD_KEYS = ("epochs", "batch_size", "lr", "optimizer", "schedule", "final_lr", "warmup_epochs", "warmup_lr", "momentum")
OLD_KEYS += ("weight_decay", "gradient_clip", "test_batch_size")
NEW_KEYS = ("steps", "drop_last", "warmup", "warmup_steps", "select", "validate_every")


# -- the epoch that the validation images choose ----------------------------------------------------------------------
def scored_epochs(config: RunConfig) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Return the validation accuracy and the parameters after every epoch, without a selection."""
    accuracies, states = [], []
    for epoch in range(config.recipe.epochs or 0):
        state = trained_until(config, epoch)
        states.append(state)
        accuracies.append(state.pop("accuracy").item())
    return accuracies, states


def trained_until(config: RunConfig, epoch: int) -> dict[str, torch.Tensor]:
    """Train up to ``epoch``, and score the validation images."""
    recorded: dict[str, torch.Tensor] = {}
    end = PromptModule.on_train_epoch_end

    def stop(module: PromptModule) -> None:
        end(module)
        if module.current_epoch == epoch:
            recorded.update(module.method.trained_state())
            module.trainer.should_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptModule, "on_train_epoch_end", stop)
        values = dataclasses.replace(config.recipe, select="last")
        plain = dataclasses.replace(config, recipe=values, output=f"{config.output}-{epoch}")
        recorded["accuracy"] = torch.tensor(validate(plain)["accuracy"])
    return recorded


@pytest.mark.parametrize("method", ["coop", "promptsrc"])
def test_the_first_of_the_best_epochs_is_kept(method: str, chosen: Tiny) -> None:
    """As in Dassl, whose best_val keeps an epoch that is strictly better than all before; PromptSRC averages first."""
    config = chosen(method, transform="random") if method == "promptsrc" else chosen(method)
    accuracies, states = scored_epochs(config)
    best = accuracies.index(max(accuracies))
    assert best < config.recipe.epochs - 1, f"the last epoch is another one: {accuracies}"  # type: ignore[operator]
    done = run(config)
    selected = done.results["train"]["selected"]
    assert (selected["on"], selected["epoch"]) == ("val", best)
    assert selected["scores"]["accuracy"] == pytest.approx(max(accuracies))
    assert selected["scores"]["total"] == 10
    lines = read_metrics(done.folder / "metrics.jsonl")
    assert [line["val/accuracy"] for line in lines] == pytest.approx(accuracies)
    torch.testing.assert_close(done.head().method.trained_state(), states[best], rtol=1e-5, atol=1e-7)
    assert done.results["train"]["epochs"] == 4


def test_the_training_itself_does_not_depend_on_the_selection(chosen: Tiny) -> None:
    last, best = run(chosen(select="last")), run(chosen())
    assert "selected" not in last.results["train"]
    kept = [
        [{name: value for name, value in line.items() if not name.startswith("val/")} for line in lines]
        for lines in (read_metrics(done.folder / "metrics.jsonl") for done in (last, best))
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("point", [("after", "last.ckpt", 1), ("after", "last.ckpt", 3), ("after", "last.ckpt", 4)])
def test_the_selection_is_resumed(point: tuple[str, str, int], chosen: Tiny, tmp_path: Path) -> None:
    whole = run(chosen(output=str(tmp_path / "whole")))
    config = chosen()
    killed(lambda: run(config), *point)
    done = run(config)
    torch.testing.assert_close(done.head().method.trained_state(), whole.head().method.trained_state(), rtol=0, atol=0)
    assert done.results["train"]["selected"] == whole.results["train"]["selected"]
    assert (done.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()
    head = load_head(done.folder / "head").method
    torch.testing.assert_close(head.trained_state(), whole.head().method.trained_state(), rtol=0, atol=0)


def test_steps_may_end_in_an_epoch_that_is_scored(chosen: Tiny) -> None:
    done = run(chosen(steps=3, schedule="step", epochs=None))
    lines = read_metrics(done.folder / "metrics.jsonl")
    assert len(lines) == 2 and all("val/accuracy" in line for line in lines)
    assert done.results["train"]["selected"]["epoch"] in (0, 1)


@pytest.mark.parametrize("select", ["last", "best_val"])
@pytest.mark.parametrize(("every", "scored"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_epochs_are_scored_on_request(
    select: str, every: int, scored: list[int], chosen: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chosen(select=select, epochs=5, validate_every=every)
    done = run(config)
    values = done.validation()
    assert list(values) == scored and len(read_metrics(done.folder / "metrics.jsonl")) == 5
    best = max(values, key=lambda epoch: values[epoch])
    assert (done.selected is None) == (select == "last")
    if done.selected is not None:
        assert done.selected["epoch"] == best
        assert done.selected["scores"]["accuracy"] == pytest.approx(values[best])
    assert "validation images scored every" in dry_run(config)
    assert main(["train", "--config", str(done.folder / "config.yaml")]) == 0
    text = capsys.readouterr().out
    assert "validation: accuracy in % after epoch " + ", ".join(f"{at}: {values[at]:.2f}" for at in scored) in text
    kept = "the last epoch" if select == "last" else f"epoch {best} (recipe.select best_val)"
    assert f"best {values[best]:.2f} after epoch {best}; kept is {kept}" in text


def test_scores_by_epoch_do_not_change_the_training(chosen: Tiny) -> None:
    plain, scored = run(chosen(select="last")), run(chosen(select="last", validate_every=1))
    assert plain.validation() == {} and plain.folder != scored.folder
    torch.testing.assert_close(
        plain.head().method.trained_state(), scored.head().method.trained_state(), rtol=0, atol=0
    )


def test_few_scores_of_many_epochs_are_printed() -> None:
    values = {epoch: 50 + epoch / 10 - (epoch > 90) for epoch in range(100)}
    text = validation_text(values, "mean_per_class", {"epoch": 90})
    assert text.startswith("validation: mean per-class accuracy in % after epoch 0: 50.00, 14: 51.40, ")
    assert ", 99: 58.90 (8 of 100; all are in metrics.jsonl)\n" in text
    assert text.endswith("best 59.00 after epoch 90; kept is epoch 90 (recipe.select best_val)")
    assert len(max(text.splitlines(), key=len)) < 200


def test_a_training_that_ends_before_its_first_validation_is_scored_at_the_end(chosen: Tiny) -> None:
    end = PromptModule.on_train_epoch_end

    def stop(module: PromptModule) -> None:
        end(module)
        module.trainer.should_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptModule, "on_train_epoch_end", stop)
        done = run(chosen(validate_every=3))
    assert done.selected is not None and done.selected["epoch"] == 0


def test_a_selection_without_validation_images_is_refused(tiny: Tiny, chosen: Tiny) -> None:
    for act in (run, dry_run):
        with pytest.raises(
            ConfigError, match="recipe.select is 'best_val', but .* has no validation images; accepted: last"
        ):
            act(tiny("coop", select="best_val"))
        with pytest.raises(ConfigError, match="'best_val', but zeroshot takes no gradient steps over images"):
            act(chosen("zeroshot"))
        with pytest.raises(
            ConfigError, match="recipe.validate_every is 2, but .* no validation images; accepted: null"
        ):
            act(tiny("coop", validate_every=2))
        with pytest.raises(ConfigError, match="validate_every is 1, but zeroshot takes no gradient steps over images"):
            act(chosen("zeroshot", select="last", validate_every=1))


def test_a_selection_on_test_images_is_refused(chosen: Tiny) -> None:
    from vlprompt.runs.session import Session

    session = Session(chosen())
    session.drawn = dataclasses.replace(session.drawn, test=[*session.drawn.test, session.drawn.val[0]])
    with pytest.raises(ConfigError, match="1 of .*'s 10 validation images are test images, too; accepted: last"):
        session.check_selection()


@pytest.mark.parametrize(("values", "accepted"), [({"select": "best_val"}, "last"), ({"validate_every": 1}, "null")])
def test_a_training_without_a_data_module_is_refused(values: dict[str, Any], accepted: str, image_folder: Path) -> None:
    task = load_dataset("folder", root=image_folder, shots=1)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names)
    data = FewShotData(task, method.backbone.preprocess, batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ConfigError, match=f"no data module with validation images; accepted: {accepted}"):
        trainer.fit(PromptModule(method, RecipeConfig(epochs=1, **values)), data.train_dataloader())
