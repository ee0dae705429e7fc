"""Killed with SIGKILL at any point and run again: the same final weights, bit for bit, and at most one epoch lost."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.processes import killed
from vlprompt.cli.main import main
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RunConfig
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.module import PromptModule
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
FolderOf = Callable[[RunConfig], Path]
ROOT = Path(__file__).parents[2]
EPOCHS = 4  # of 2 steps each: 10 images in batches of 4
KINDS: dict[str, dict[str, Any]] = {
    "coop": {"epochs": EPOCHS, "lr": 0.1},
    # Everything that a resumed run could get wrong: random views, two optimiser groups, clipping, accumulation.
    "mocoop": {
        "settings": {"tune_layer_norms": True},
        "transform": "random",
        "epochs": EPOCHS,
        "lr": 0.1,
        "gradient_clip": 1.0,
        "accumulate": 2,
    },
    # A loader process asks for batches before the epoch is said; without kept features it decodes images.
    "workers": {
        "method": "coop",
        "transform": "random",
        "epochs": EPOCHS,
        "lr": 0.1,
        "workers": 1,
        "cached_views": 0,
    },
}
# What is killed, and when: at the n-th training step, or before or after the n-th file of a name is put in place.
POINTS = [
    ("step", "", 2),  # within the first epoch
    ("step", "", 6),  # within the third
    ("before", "env.json", 1),
    ("before", "metrics.jsonl", 2),
    ("after", "metrics.jsonl", 3),  # the epoch's line is written, its checkpoint is not
    ("before", "last.ckpt", 2),
    ("after", "last.ckpt", 2),
    ("after", "last.ckpt", EPOCHS),  # trained, but not evaluated
    ("after", "head.safetensors", 1),  # half of a head
    ("after", "config.json", 1),  # the whole head, no results
    ("before", "results.json", 1),
]


def configured(kind: str, tiny: Tiny, output: Path) -> RunConfig:
    return tiny(**{"method": kind, **KINDS[kind]}, output=str(output))


def kill(config: RunConfig, point: tuple[str, str, int]) -> None:
    """Run in a process of its own that is killed at the point."""
    killed(lambda: run(config), *point, step=(PromptModule, "training_step"))


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be equal: the head's tensors, the metrics, the results but for the seconds that they took."""
    results = json.loads((folder / "results.json").read_text())
    kept = {name: results[name] for name in ("results", "zeroshot", "config_sha256", "data", "backbone")}
    head = hashlib.sha256((folder / "head" / "head.safetensors").read_bytes()).hexdigest()
    return {
        "head": head,
        "metrics": (folder / "metrics.jsonl").read_text(),
        "epochs": results["train"]["epochs"],
        **kept,
    }


def epochs_kept(folder: Path) -> tuple[int, int]:
    """Epochs that the metrics tell of, and epochs that the last checkpoint holds."""
    path = folder / "last.ckpt"
    kept = (
        torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"] if path.is_file() else {}
    )
    return len(read_metrics(folder / "metrics.jsonl")), kept.get("processed", 0)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    """The outcomes of runs that nothing disturbed, by kind."""
    return {}


@pytest.fixture
def expected(tiny: Tiny, folder_of: FolderOf, tmp_path: Path, uninterrupted: dict[str, Any]) -> Callable[[str], Any]:
    def of(kind: str) -> dict[str, Any]:
        if kind not in uninterrupted:
            config = configured(kind, tiny, tmp_path / "whole")
            run(config)
            uninterrupted[kind] = outcome(folder_of(config))
        return uninterrupted[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "point"),
    [*(("mocoop", point) for point in POINTS), *(("coop", POINTS[i]) for i in (1, 5)), ("workers", POINTS[1])],
)
def test_killed_and_run_again(
    kind: str,
    point: tuple[str, str, int],
    tiny: Tiny,
    folder_of: FolderOf,
    tmp_path: Path,
    expected: Callable[[str], dict[str, Any]],
) -> None:
    config = configured(kind, tiny, tmp_path / "runs")
    folder = folder_of(config)
    kill(config, point)
    assert not (folder / "results.json").exists()
    logged, kept = epochs_kept(folder)
    assert logged - 1 <= kept <= logged  # at most the current epoch is lost
    done = run(config)
    assert not done.reused
    assert outcome(folder) == expected(kind)
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(EPOCHS))
    assert {entry.name for entry in folder.iterdir()} == {
        *("config.yaml", "env.json", "split.json", "images.json", "metrics.jsonl", "last.ckpt", "head", "results.json"),
        *("per_class.csv", "confusion.csv"),
    }


def test_only_what_is_left_is_trained(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("coop", tiny, tmp_path / "runs")
    kill(config, ("after", "last.ckpt", 3))
    steps: list[int] = []
    step = PromptModule.training_step

    def counted(module: PromptModule, batch: Any, batch_idx: int) -> torch.Tensor:
        steps.append(module.current_epoch)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(PromptModule, "training_step", counted)
    run(config)
    assert steps == [3, 3]


def test_interrupted_and_run_again(
    tiny: Tiny, folder_of: FolderOf, tmp_path: Path, expected: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the caller as such (Lightning alone would turn it into an exit with status 1)."""
    config = configured("coop", tiny, tmp_path / "runs")
    step, before = PromptModule.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(module: PromptModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if module.current_epoch == 2:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(PromptModule, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert epochs_kept(folder_of(config)) == (2, 2)
    run(config)
    assert outcome(folder_of(config)) == expected("coop")


def test_the_command_killed_from_outside(
    image_folder: Path, tmp_path: Path, folder_of: FolderOf, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config",
        str(ROOT / "configs" / "mocoop" / "demo.yaml"),
        "--data.name",
        "folder",
        "--data.root",
        str(image_folder),
        *("--backbone.name", "demo", "--settings.groups", "[1, 1, 1]"),
        *("--settings.templates", '["an emoji of a {}.", "a photo of a {}.", "a cartoon {}."]'),
    ]
    words += ["--data.transform", "random", "--data.shots", "2", "--settings.tune_layer_norms", "true"]
    words += ["--recipe.epochs", "6", "--recipe.batch_size", "2", "--recipe.lr", "0.05", "--trainer.progress", "false"]
    config = parse_run([*words, "--output", str(tmp_path / "whole")])
    run(config)
    whole = outcome(folder_of(config))

    words += ["--output", str(tmp_path / "runs")]
    folder = folder_of(parse_run(words))

    def lines() -> int:
        path = folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    process, deadline = get_context("fork").Process(target=main, args=(["train", *words],)), time.monotonic() + 120
    process.start()
    while lines() < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    logged, kept = epochs_kept(folder)
    assert logged - 1 <= kept <= logged and 1 <= kept < 6  # amid training
    assert main(["train", *words]) == 0
    assert f"run folder: {folder}" in capsys.readouterr().out
    assert outcome(folder) == whole
