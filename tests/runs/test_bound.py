"""Checkpoints, heads and results of another run, or with values that are not finite, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlprompt.config.run import RunConfig
from vlprompt.engine.module import PromptModule
from vlprompt.errors import VlpromptError
from vlprompt.runs.folder import run_folder
from vlprompt.runs.run import Run, complete, run

Tiny = Callable[..., RunConfig]


@pytest.fixture
def two(tiny: Tiny) -> tuple[RunConfig, Run, Run]:
    """A configuration, its run, and the run of another seed."""
    config = tiny("coop")
    return config, run(config), run(replace(config, seed=2))


@pytest.mark.parametrize("name", ["head", "results.json", "last.ckpt"])
def test_files_of_another_run_are_refused(name: str, two: tuple[RunConfig, Run, Run]) -> None:
    config, own, other = two
    if name == "last.ckpt":
        (own.folder / "results.json").unlink()
    if name == "head":
        shutil.rmtree(own.folder / name)
        shutil.copytree(other.folder / name, own.folder / name)
    else:
        shutil.copy(other.folder / name, own.folder / name)
    with pytest.raises(VlpromptError, match="another run|other data, settings or weights") as caught:
        run(config)
    assert "mv " in str(caught.value) and "--force" not in str(caught.value)


def test_a_checkpoint_that_is_not_finite_is_refused_and_its_advice_works(two: tuple[RunConfig, Run, Run]) -> None:
    config, own, _ = two
    (own.folder / "results.json").unlink()
    path = own.folder / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {key: value * torch.nan for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    with pytest.raises(VlpromptError, match="not finite.*\n.*prompt.ctx"):
        run(config)
    path.rename(path.with_suffix(".old"))
    assert run(config).results["results"] == own.results["results"]


@pytest.mark.parametrize("part", ["loops", "lr_schedulers", "pytorch-lightning_version"])
def test_a_checkpoint_with_an_odd_part_is_refused(part: str, two: tuple[RunConfig, Run, Run]) -> None:
    config, own, _ = two
    (own.folder / "results.json").unlink()
    path: Path = own.folder / "last.ckpt"
    odd = {"loops": {}, "lr_schedulers": [{"x": 1}], "pytorch-lightning_version": "odd"}
    torch.save({**torch.load(path, weights_only=True), part: odd[part]}, path)
    with pytest.raises(VlpromptError, match="cannot continue from"):
        run(config)


@pytest.mark.parametrize(
    "change",
    [
        {"results": {"all": [1]}},
        {"data": []},
        {"selection": "x"},
        {"versions": [1]},
        {"zeroshot": {"all": {"accuracy": "x"}}},
        {"train": {"selected": "x"}},
    ],
)
def test_results_of_a_wrong_type_are_refused(change: dict[str, object], two: tuple[RunConfig, Run, Run]) -> None:
    config, own, _ = two
    path = own.folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(VlpromptError, match="results.json cannot be used"):
        run(config)


def test_a_folder_removed_during_the_training_is_whole_at_the_end(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ended = tiny("coop", epochs=3), PromptModule.on_train_epoch_end

    def removed(module: PromptModule) -> None:
        ended(module)
        if module.current_epoch == 1:
            shutil.rmtree(folder)

    with monkeypatch.context() as patch:
        patch.setattr(PromptModule, "on_train_epoch_end", removed)
        folder = run_folder(complete(config))
        first = run(config)
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "env.json", "head", "last.ckpt", "metrics.jsonl", "results.json", "split.json"),
        *("per_class.csv", "confusion.csv"),
    }
    assert first.results["train"]["epochs"] == 3 and run(config).reused
