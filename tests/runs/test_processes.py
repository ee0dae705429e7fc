"""Two processes (gloo, CPU) against one at the same global batch: losses, weights, accuracies, exact counts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file

from tests.fixtures.runs import tiny_run
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import load_dataset
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.module import PromptModule
from vlprompt.errors import ConfigError
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
Command = Callable[..., "subprocess.Popen[str]"]
TOLERANCE = 1e-5

# Trains every configuration of a JSON file; then a PromptModule in a Trainer of Lightning's defaults. Every process but
# the first ends with an error if it opens a file for writing, or makes or removes anything, under the output folder.
SCRIPT = """
import json, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
rank = int(os.environ.get("LOCAL_RANK", 0))

def watch(event, arguments):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        path = str(arguments[0])
        writing = event != "open" or isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writing and path.startswith(str(folder)):
            print(f"process {rank} touched {path}: {event}", file=sys.stderr)
            os._exit(3)

def say(text):
    # In one write: print() makes several of a line, and what two processes say would mix.
    sys.stdout.flush()
    os.write(1, f"{text}\\n".encode())

if rank:
    sys.addaudithook(watch)

from vlprompt.runs.run import run
from vlprompt.cli.parse import parse_run

for words, force in json.loads((folder / "runs.json").read_text()):
    done = run(parse_run(words), force=force)
    say(f"process {rank} {'reused' if done.reused else 'trained'} {done.folder.name}")

import torch, vlprompt
import pytorch_lightning as pl
from vlprompt.config.run import RecipeConfig

pl.seed_everything(1)
task = vlprompt.load_dataset("folder", root=sys.argv[2], shots=2)
backbone = vlprompt.load_backbone("demo")
method = vlprompt.create_method("coop", backbone, task.class_names, context_init="an emoji of a")
module = vlprompt.PromptModule(method, RecipeConfig(epochs=2, lr=0.1))
data = vlprompt.FewShotData(task, backbone.preprocess, batch_size=4, test_batch_size=3)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, default_root_dir=folder,
)
trainer.fit(module, datamodule=data)
(scores,) = trainer.test(module, datamodule=data, verbose=False)
ctx = method.trained_state()["prompt.ctx"]
for turn in (0, 1):  # such a long line takes several writes
    if rank == turn:
        say("OWN " + json.dumps({"rank": rank, "scores": scores, "ctx": ctx.tolist()}))
    torch.distributed.barrier()
"""


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


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        output, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the processes hang:\n{process.communicate()[1][-3000:]}")
    assert process.returncode == 0, errors[-3000:]
    return output, errors


@pytest.mark.slow
def test_the_command_on_two_processes(
    tiny: Tiny, folder_of: Callable[[RunConfig], Path], tmp_path: Path, command: Command
) -> None:
    """CoOp and MoCoOp as published: random views, tuned layer norms, virtual classes; 9 base and 4 new test images."""
    common: dict[str, Any] = {"classes": "base", "transform": "random", "epochs": 4, "lr": 0.05, "test_batch_size": 2}
    configs = [
        tiny("coop", {"context_init": "", "context_length": 4}, **common),
        tiny("mocoop", {"tune_layer_norms": True}, gradient_clip=1.0, **common),
    ]
    words = [word for config in configs for word in words_of(config, tmp_path / "configs")]
    two = tmp_path / "two"
    output, errors = finish(
        command(
            *("tools/base_to_new.py", *words, "--seeds", "1", "--output", str(two)),
            *("--trainer.devices", "2", "--trainer.accelerator", "cpu"),
        )
    )
    assert "Traceback" not in errors
    assert output.count("base-to-new accuracy") == 1 and output.count("run folder:") == 2  # one process speaks
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


@pytest.mark.slow
def test_switches_short_batches_and_own_trainers(
    tiny: Tiny,
    folder_of: Callable[[RunConfig], Path],
    image_folder: Path,
    validated_folder: Path,
    tmp_path: Path,
    command: Command,
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
    jobs = [(words_of(config, tmp_path / "configs"), False) for config in twice]
    # Then one again, which is reused, and one with --force: no process may take up what another is about to remove.
    jobs += [(jobs[0][0], False), (jobs[1][0], True)]
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(jobs))
    (tmp_path / "script.py").write_text(SCRIPT)
    output, errors = finish(
        command(str(tmp_path / "script.py"), str(folder), str(image_folder), PYTHONPATH=str(Path(__file__).parents[2]))
    )
    assert "touched" not in errors
    for rank in (0, 1):
        done = [line.split()[2] for line in output.splitlines() if line.startswith(f"process {rank} ")]
        assert done == ["trained"] * len(configs) + ["reused", "trained"]
    for config, single in zip(twice, singles, strict=True):
        assert single.results["results"]["all"]["total"] == 13
        if config.method != "zeroshot":
            assert max(compare(single.folder, folder_of(config)).values()) < TOLERANCE
        both = json.loads((folder_of(config) / "results.json").read_text())
        assert agree(both["results"], single.results["results"])
        assert both["train"]["steps"] == single.results["train"]["steps"]
        assert agree(both["train"].get("selected"), single.results["train"].get("selected"))
    assert singles[-2].results["train"]["selected"]["epoch"] < 3

    own = [json.loads(line.removeprefix("OWN ")) for line in output.splitlines() if line.startswith("OWN ")]
    assert sorted(each["rank"] for each in own) == [0, 1]
    scores, ctx = one_process(image_folder)
    for each in own:
        assert agree(each["scores"], scores) and scores["test/total"] == 13
        assert difference(torch.tensor(each["ctx"]), ctx) < TOLERANCE


def one_process(image_folder: Path) -> tuple[dict[str, float], torch.Tensor]:
    """What the script's own Trainer does, on one process."""
    import vlprompt

    pl.seed_everything(1, verbose=False)
    task = load_dataset("folder", root=image_folder, shots=2)
    backbone = vlprompt.load_backbone("demo")
    method = vlprompt.create_method("coop", backbone, task.class_names, context_init="an emoji of a")
    module = PromptModule(method, RecipeConfig(epochs=2, lr=0.1))
    data = FewShotData(task, backbone.preprocess, batch_size=4, test_batch_size=3)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    return dict(scores), method.trained_state()["prompt.ctx"]


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_all_processes(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    words = words_of(tiny("coop", epochs=3, lr=1e38), tmp_path / "configs")
    process = command("tools/train.py", *words, "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "the loss is not finite in epoch" in errors and "--recipe.lr" in errors


def test_too_few_images_for_the_processes(tiny: Tiny) -> None:
    from vlprompt.data import TrainSampler

    with pytest.raises(ConfigError, match="1 training images for 2 processes"):
        TrainSampler(1, 2, seed=1, world_size=2)
    assert "LOCAL_RANK" not in os.environ  # these tests leave nothing behind that would start or hide processes
    with pytest.raises(ConfigError, match="recipe.batch_size is 3"):
        tiny("coop", batch_size=3, devices=2)
