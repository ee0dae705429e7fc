"""Two processes (gloo, CPU) against one at the same global batch: losses, weights, accuracies, exact counts."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file

from tests.fixtures.processes import in_group, run_script
from tests.fixtures.runs import ROOT, tiny_run
from vlprompt.cli.main import main
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import load_dataset
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.module import PromptModule
from vlprompt.errors import ConfigError
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
TOLERANCE = 1e-5


def in_one_of_two(
    folder: Path, image_folder: Path, jobs: list[tuple[RunConfig, bool]]
) -> tuple[list[bool], dict[str, float], list[float]]:
    """Train every configuration, then a PromptModule in a Trainer of Lightning's defaults.

    Every process but the first ends if it opens a file for writing, or makes or removes anything, under ``folder``.

    Returns:
        Which of the runs were reused, and the scores and the context of the module.
    """
    rank = int(os.environ["LOCAL_RANK"])

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            path = str(arguments[0])
            writing = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            if writing and path.startswith(str(folder)):
                print(f"process {rank} touched {path}: {event}", file=sys.stderr, flush=True)
                os._exit(3)

    if rank:
        sys.addaudithook(watch)
    reused = [run(config, force=force).reused for config, force in jobs]
    scores, context = own_trainer(image_folder, devices=2, strategy="ddp", default_root_dir=folder)
    return reused, scores, context.tolist()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """``max|a - b| / max|b|``."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max()) if a.numel() else 0.0


def agree(ours: Any, theirs: Any) -> bool:
    """Whether nested results are equal: counts exactly, percentages up to rounding (ECE averages confidences)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(agree(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=TOLERANCE)
    return bool(ours == theirs)


def compare(one: Path, two: Path) -> dict[str, float]:
    """Return the largest relative differences between two run folders; counts have to be equal."""
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (two, one))
    assert agree(ours["results"], theirs["results"]) and agree(ours["zeroshot"], theirs["zeroshot"])
    lines = list(zip(read_metrics(two / "metrics.jsonl"), read_metrics(one / "metrics.jsonl"), strict=True))
    losses = [
        abs(a[name] - b[name]) / abs(b[name]) for a, b in lines for name in b if name.startswith("train/") and b[name]
    ]
    assert [(a["epoch"], a["lr"], a.keys()) for a, _ in lines] == [(b["epoch"], b["lr"], b.keys()) for _, b in lines]
    a, b = (load_file(folder / "head" / "head.safetensors") for folder in (two, one))
    assert a.keys() == b.keys()
    learned = [difference(a[name], b[name]) for name in b if name.startswith("learnable.")]
    found = {
        "losses": max(losses),
        "learnables": max(learned),
        "class_weights": difference(a["class_weights"], b["class_weights"]),
    }
    print(one.parts[-3], one.name, {name: f"{value:.1e}" for name, value in found.items()})
    return found


def words_of(config: RunConfig, folder: Path) -> list[str]:
    """Write the configuration into ``folder``; return the words that name it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    return ["--config", str(path)]


def test_the_command_on_two_processes(tiny: Tiny, folder_of: Callable[[RunConfig], Path], tmp_path: Path) -> None:
    """CoOp and MoCoOp as published: random views, tuned layer norms, virtual classes; 9 base and 4 new test images."""
    common: dict[str, Any] = {"classes": "base", "transform": "random", "epochs": 4, "lr": 0.05, "test_batch_size": 2}
    configs = [
        tiny("coop", {"context_init": "", "context_length": 4}, **common),
        tiny("mocoop", {"tune_layer_norms": True}, gradient_clip=1.0, **common),
    ]
    words = [word for config in configs for word in words_of(config, tmp_path / "configs")]
    two = tmp_path / "two"
    words += ["--seeds", "1", "--output", str(two), "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    done = run_script([sys.executable, str(ROOT / "tools" / "base_to_new.py"), *words])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    # One process speaks.
    assert done.stdout.count("base-to-new accuracy") == 1 and done.stdout.count("run folder:") == 2
    assert len(list(two.glob("base_to_new-*.json"))) == 1
    changed: list[bool] = []
    for config in configs:
        single = run(config)
        both = folder_of(dataclasses.replace(config, output=str(two)))
        assert max(compare(single.folder, both).values()) < TOLERANCE
        assert {entry.name for entry in both.iterdir()} == {entry.name for entry in single.folder.iterdir()}
        scores = single.results["results"]
        assert (scores["base"]["total"], scores["new"]["total"]) == (9, 4)
        changed.append(scores != single.results["zeroshot"])
        kept = yaml.safe_load((both / "config.yaml").read_text())
        assert kept["trainer"]["devices"] == 2
    assert any(changed)  # training has changed predictions, so that equal accuracies say something


def test_switches_short_batches_and_own_trainers(
    tiny: Tiny, folder_of: Callable[[RunConfig], Path], image_folder: Path, validated_folder: Path, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"text_correction": False, "text_loss_weight": 0.0, "gate_loss_weight": 0.0, "top_k": 1}
    configs = [
        # 5 images in a batch of up to 8: 3 for one process, 2 for the other.
        tiny("coop", shots=1, batch_size=8, epochs=4, lr=0.1),
        tiny("mocoop", {"tune_layer_norms": True}, transform="random", shots=1, batch_size=8, epochs=4, lr=0.1),
        tiny("mocoop", {**plain, "context_counting": "tokens"}, accumulate=2, epochs=3, lr=0.1),
        tiny("mocoop", {"drop_unused_experts": True, "top_k": 1}, epochs=3, lr=0.1),
        tiny("coop", {"context_init": "", "context_length": 2, "class_specific": True}, epochs=3, lr=0.1, workers=1),
        # 5 images in batches of 2: one of the processes has no share of the last batch. The training ends in an epoch.
        tiny("coop", shots=1, batch_size=2, drop_last=False, steps=8, schedule="step", warmup_steps=2, lr=0.1),
        tiny_run(validated_folder, tmp_path / "runs", "coop", epochs=4, lr=2.0, select="best_val"),
        tiny("zeroshot"),
    ]
    folder = tmp_path / "two"
    singles = [run(config) for config in configs]
    twice = [
        dataclasses.replace(c, output=str(folder), trainer=dataclasses.replace(c.trainer, devices=2)) for c in configs
    ]
    # Then one again, which is reused, and one with --force: no process may take up what another is about to remove.
    jobs = [*((config, False) for config in twice), (twice[0], False), (twice[1], True)]
    folder.mkdir()
    both_ranks = in_group(2, in_one_of_two, folder, image_folder, jobs)
    for reused, _, _ in both_ranks:
        assert reused == [False] * len(configs) + [True, False]
    for config, single in zip(twice, singles, strict=True):
        assert single.results["results"]["all"]["total"] == 13
        if config.method != "zeroshot":
            assert max(compare(single.folder, folder_of(config)).values()) < TOLERANCE
        both = json.loads((folder_of(config) / "results.json").read_text())
        assert agree(both["results"], single.results["results"])
        assert both["train"]["steps"] == single.results["train"]["steps"]
        assert agree(both["train"].get("selected"), single.results["train"].get("selected"))
    assert singles[-2].results["train"]["selected"]["epoch"] < 3

    scores, context = own_trainer(image_folder)
    for _, own_scores, own_context in both_ranks:
        assert agree(own_scores, scores) and scores["test/total"] == 13
        assert difference(torch.tensor(own_context), context) < TOLERANCE


def own_trainer(image_folder: Path, **values: Any) -> tuple[dict[str, float], torch.Tensor]:
    """Train and test a PromptModule in a Trainer of these values; return the scores and the context."""
    import vlprompt

    pl.seed_everything(1, verbose=False)
    task = load_dataset("folder", root=image_folder, shots=2)
    backbone = vlprompt.load_backbone("demo")
    method = vlprompt.create_method("coop", backbone, task.class_names, context_init="an emoji of a")
    module = PromptModule(method, RecipeConfig(epochs=2, lr=0.1))
    data = FewShotData(task, backbone.preprocess, batch_size=4, test_batch_size=3)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False, **values},
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    return dict(scores), method.trained_state()["prompt.ctx"]


def status_and_errors(words: list[str]) -> tuple[int, str]:
    """Run a command in one of two processes."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(words)
    return status, errors.getvalue()


def test_loss_that_is_not_finite_ends_all_processes(tiny: Tiny, tmp_path: Path) -> None:
    words = words_of(tiny("coop", epochs=3, lr=1e38), tmp_path / "configs")
    words = ["train", *words, "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    for status, errors in in_group(2, status_and_errors, words):
        assert status == 2
        assert "the loss is not finite in epoch" in errors and "--recipe.lr" in errors


def test_too_few_images_for_the_processes(tiny: Tiny) -> None:
    from vlprompt.data import TrainSampler

    with pytest.raises(ConfigError, match="1 training images for 2 processes"):
        TrainSampler(1, 2, seed=1, world_size=2)
    assert "LOCAL_RANK" not in os.environ  # these tests leave nothing behind that would start or hide processes
    with pytest.raises(ConfigError, match="recipe.batch_size is 3"):
        tiny("coop", batch_size=3, devices=2)
