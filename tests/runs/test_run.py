"""The run folder: what it holds, when it is reused, redone, resumed or refused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import vlprompt
from tests.fixtures.runs import tiny_run
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RunConfig
from vlprompt.datasets import load_dataset
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.metrics import OF_ONE_LABEL
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import BackboneError, ConfigError, DataError, HeadError, VlpromptError
from vlprompt.io.head import load_head
from vlprompt.methods.mocoop import MoCoOpSettings
from vlprompt.runs.folder import config_sha256
from vlprompt.runs.run import Run, complete, evaluate_head, harmonic_mean, run

Tiny = Callable[..., RunConfig]
FILES = {
    *("config.yaml", "env.json", "split.json", "images.json", "metrics.jsonl", "last.ckpt", "head", "results.json"),
    *("per_class.csv", "confusion.csv"),
}


def one_screen(error: BaseException) -> str:
    text = str(error)
    assert 0 < len(text.splitlines()) <= 25 and "Traceback" not in text
    return text


def stamps(folder: Path) -> dict[str, int]:
    """When each file was last put in place; the configuration may be written again."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"}


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Run]:
    """A finished run, which tests copy."""
    config = tiny_run(image_folder, tmp_path_factory.mktemp("trained"), "mocoop", classes="base", epochs=3, lr=0.1)
    return config, run(config)


@pytest.fixture
def finished(trained: tuple[RunConfig, Run], tmp_path: Path) -> tuple[RunConfig, Run]:
    """A finished run of the test's own."""
    config, done = trained
    output = tmp_path / "runs"
    shutil.copytree(config.output, output)
    folder = output / done.folder.relative_to(config.output)
    return replace(config, output=str(output)), replace(done, folder=folder)


def test_folder_holds_what_is_promised(finished: tuple[RunConfig, Run], tmp_path: Path) -> None:
    config, done = finished
    folder = done.folder
    assert folder.parent == tmp_path / "runs" / "mocoop" / "folder"
    assert folder.name == f"base-2shot-seed1-{config_sha256(complete(config))[:8]}"
    assert {entry.name for entry in folder.iterdir()} == FILES and not done.reused

    environment = json.loads((folder / "env.json").read_text())
    assert environment["seeds"] == {"run": 1, "shots": 1}
    assert {"vlprompt", "torch", "open_clip_torch", "pytorch-lightning", "python"} <= environment["versions"].keys()
    own = {"class names", "preprocessing", "content of the images"}
    assert set(environment["inputs"]) == {"split", "choice of shots", "backbone", "initial prompts"} | own
    assert {"command", "git", "machine"} <= environment.keys()

    results = json.loads((folder / "results.json").read_text())
    assert results == done.results and results["schema"] == 1
    assert results["config_sha256"] == config_sha256(complete(config)) and results["method"] == "mocoop"
    task = load_dataset("folder", root=config.data.root, shots=2, classes="base")
    assert results["data"]["split_sha256"] == task.split_sha256 == environment["inputs"]["split"]
    assert results["backbone"]["fingerprint"] == environment["inputs"]["backbone"]
    for part in ("results", "zeroshot"):
        scores = results[part]
        assert (scores["base"]["total"], scores["new"]["total"]) == (9, 4)
        for score in (scores["base"], scores["new"]):
            assert score["accuracy"] == 100 * score["correct"] / score["total"]
        assert scores["harmonic_mean"] == harmonic_mean(scores["base"]["accuracy"], scores["new"]["accuracy"])
    assert results["train"]["epochs"] == 3 and results["train"]["seconds"] > 0

    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    head = load_file(folder / "head" / "head.safetensors")
    learned = {name.removeprefix("learnable."): value for name, value in head.items() if name.startswith("learnable.")}
    assert {name.removeprefix("method."): value.shape for name, value in checkpoint["state_dict"].items()} == {
        name: value.shape for name, value in learned.items()
    }
    assert all(torch.equal(checkpoint["state_dict"][f"method.{name}"], value) for name, value in learned.items())
    assert "mocoop" in done.table() and "zero-shot" in done.table() and "harmonic mean" in done.table()


def test_kept_configuration_is_this_run(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    kept = yaml.safe_load((done.folder / "config.yaml").read_text(encoding="utf-8"))
    assert kept["recipe"]["epochs"] == 3 and kept["data"]["root"] == config.data.root
    again = parse_run(["--config", str(done.folder / "config.yaml")])
    assert run(again).reused  # so that `vlprompt train --config RUN/config.yaml` resumes or shows it


def test_logged_rates_are_the_schedule(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    lines = read_metrics(done.folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([learning_rate(e, 0.1, config.recipe) for e in range(3)])
    for line in lines:
        terms = line["train/ce"] + line["train/text"] + line["train/gate"]
        assert line["train/loss"] == pytest.approx(terms, rel=1e-6)


def test_finished_run_is_reused(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    before = stamps(done.folder)
    shown_otherwise = replace(config, trainer=replace(config.trainer, progress=True))
    again = run(shown_otherwise)  # what cannot change a result does not make another run
    assert again.reused and again.folder == done.folder and again.results == done.results
    assert again.table() == done.table()
    assert stamps(done.folder) == before


def test_reused_run_has_the_trained_tensors(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop", lr=0.1)
    task = load_dataset("folder", root=config.data.root, shots=2)
    backbone = vlprompt.load_backbone("demo")

    def trained() -> tuple[Run, dict[str, torch.Tensor]]:
        method = vlprompt.create_method("coop", backbone, task.class_names, context_init="an emoji of a")
        done = vlprompt.train(method, task, output=str(tmp_path), transform="center", epochs=2, lr=0.1, batch_size=4)
        return done, method.trained_state()

    (first, learned), (second, restored) = trained(), trained()
    assert (first.reused, second.reused) == (False, True)
    torch.testing.assert_close(restored, learned, rtol=0, atol=0)
    torch.testing.assert_close(second.head(backbone).method.trained_state(), learned, rtol=0, atol=0)


def test_force_redoes(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    before, head = stamps(done.folder), (done.head_dir / "head.safetensors").read_bytes()
    again = run(config, force=True)
    after = stamps(done.folder)
    assert not again.reused and before.keys() == after.keys()
    assert all(after[path] > before[path] for path in before)
    assert hashlib.sha256((done.head_dir / "head.safetensors").read_bytes()).digest() == hashlib.sha256(head).digest()


@pytest.mark.parametrize("change", [{"epochs": 1}, {"shots": 1}, {"seed": 2}, {"lr": 0.2}, {"transform": "random"}])
def test_what_changes_a_result_makes_another_run(change: dict[str, Any], tiny: Tiny) -> None:
    assert config_sha256(tiny("coop", **change)) != config_sha256(tiny("coop"))


def test_settings_left_out_are_the_defaults(tiny: Tiny) -> None:
    short, long = tiny("mocoop"), tiny("mocoop", {"top_k": 2, "text_loss_weight": 5.0})
    del short.settings["groups"], short.settings["templates"], long.settings["groups"]
    long.settings["templates"] = list(MoCoOpSettings.templates)
    assert config_sha256(complete(short)) == config_sha256(complete(long))
    open_template = complete(tiny("zeroshot"))  # the data set's own is filled in by the run
    assert not open_template.settings.get("templates")


def test_other_images_are_refused(tiny: Tiny, image_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "others"
    shutil.copytree(image_folder, other)
    config = tiny("coop").with_data(root=str(other))
    assert config_sha256(config) != config_sha256(tiny("coop"))  # a folder of images is named by its place
    done = run(config)
    link = tmp_path / "link"
    link.symlink_to(other)
    assert run(config.with_data(root=str(link))).reused  # the same folder by another name
    before = stamps(done.folder)
    next((other / "train").rglob("*.png")).rename(next((other / "train").iterdir()) / "another name.png")
    with pytest.raises(ConfigError, match="was started from another split.*another --output.*--force") as caught:
        run(config)
    assert str(done.folder) in one_screen(caught.value)
    assert stamps(done.folder) == before
    with pytest.warns(UserWarning, match="the earlier run was moved to .*old-1"):
        assert not run(config, force=True).reused
    aside = done.folder.with_name(f"{done.folder.name}.old-1")
    assert {path.replace(str(aside), str(done.folder)): time for path, time in stamps(aside).items()} == before
    assert load_head(aside).class_names == done.head().class_names


def test_locked_by_another_process(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    ready, hold = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock = (done.folder.parent / f".{done.folder.name}.lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        os.write(ready[1], b"!")
        os.close(hold[1])
        os.read(hold[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        before = stamps(done.folder)
        for force in (False, True):
            with pytest.raises(ConfigError, match="another process is running in .*; wait for it, or stop it first"):
                run(config, force=force)
        assert stamps(done.folder) == before
    finally:
        os.close(hold[1])
        os.waitpid(child, 0)
    assert run(config).reused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", b'{"schema": 1, "resu', "results.json cannot be read .*--force"),
        ("results.json", b"[]", "results.json holds no JSON object.*--force"),
        (
            "results.json",
            b"{}",
            "results.json cannot be used: another version.\nTo score the run again, move it aside: mv ",
        ),
        ("results.json", b'{"schema": 99}', "results.json cannot be used: another version."),
        ("env.json", b"\xff\xfe", "env.json cannot be read .*--force"),
        ("env.json", b"{}", "env.json is damaged: it lacks 'inputs'.*--force"),
        ("env.json", b'{"inputs": [1]}', "env.json is damaged: it lacks 'inputs'.*--force"),
        ("env.json", None, "holds results.json and last.ckpt but no env.json.*--force"),
        ("head/head.safetensors", b"junk", "(?s)finished but its head cannot be used.*damaged.*mv "),
        ("head/config.json", None, "(?s)finished but its head cannot be used.*holds no head.*mv "),
    ],
)
def test_damaged_finished_run(
    name: str, content: bytes | None, message: str, finished: tuple[RunConfig, Run], tmp_path: Path
) -> None:
    config, done = finished
    if content is None:
        (done.folder / name).unlink()
    else:
        (done.folder / name).write_bytes(content)
    before = stamps(done.folder)
    with pytest.raises((ConfigError, HeadError), match=message) as caught:
        run(config)
    one_screen(caught.value)
    assert stamps(done.folder) == before
    again = run(config, force=True)  # the remedy that the message names
    assert again.results["results"] == done.results["results"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("last.ckpt", b"", r"(?s)last.ckpt cannot be read .*move it aside: mv "),
        ("last.ckpt", b"PK\x03\x04 cut short", r"(?s)last.ckpt cannot be read .*move it aside: mv "),
        ("metrics.jsonl", b'{"epoch": 0, "l', "metrics.jsonl, line 1, is not the metrics of an epoch.*--force"),
    ],
)
def test_damaged_unfinished_run(
    name: str, content: bytes, message: str, finished: tuple[RunConfig, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    config, done = finished
    (done.folder / "results.json").unlink()
    (done.folder / name).write_bytes(content)
    if name == "metrics.jsonl":
        (done.folder / "last.ckpt").unlink()
    with pytest.raises(VlpromptError, match=message) as caught:
        run(config)
    one_screen(caught.value)
    assert not (done.folder / "results.json").exists()
    assert run(config, force=True).results["results"] == done.results["results"]


def test_what_a_killed_writer_left_does_no_harm(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    head = (done.head_dir / "head.safetensors").read_bytes()
    (done.folder / "results.json").unlink()
    for name in (".results.json.4711.tmp", ".last.ckpt.tmp", ".metrics.jsonl.1.tmp", ".env.json.2.tmp"):
        (done.folder / name).write_bytes(b"half")
    (done.folder / ".head.abc").mkdir()
    (done.folder / ".head.abc" / "head.safetensors").write_bytes(b"half")
    (done.head_dir / "config.json").unlink()  # killed while the old head was removed
    again = run(config)
    assert again.results["results"] == done.results["results"]
    assert {entry.name for entry in done.folder.iterdir()} == FILES
    assert (done.head_dir / "head.safetensors").read_bytes() == head


def test_zeroshot_has_nothing_to_train(tiny: Tiny) -> None:
    done = run(tiny("zeroshot"))
    assert done.results["results"] == done.results["zeroshot"]
    assert done.results["train"]["epochs"] == 0
    assert {entry.name for entry in done.folder.iterdir()} == FILES - {"metrics.jsonl", "last.ckpt"}
    assert run(tiny("zeroshot")).reused


def test_class_specific_context_says_why_new_classes_are_missing(tiny: Tiny) -> None:
    done = run(tiny("coop", {"context_init": "", "class_specific": True, "context_length": 2}, classes="base"))
    assert done.results["results"]["new"] is None and "class_specific" in done.results["results"]["why_no_new"]
    assert done.results["zeroshot"]["new"]["total"] == 4
    assert "-" in done.table()


def test_one_head_on_other_classes_and_data(finished: tuple[RunConfig, Run]) -> None:
    config, done = finished
    before = stamps(done.folder)
    for classes in ("base", "new"):
        found = evaluate_head(done.head_dir, replace(config.data, classes=classes))
        assert {name: found[name] for name in OF_ONE_LABEL} == pytest.approx(
            {name: done.results["results"][classes][name] for name in OF_ONE_LABEL}
        )
    assert stamps(done.folder) == before and {entry.name for entry in done.folder.iterdir()} == FILES


def test_settings_of_training_reach_the_trainer(tiny: Tiny) -> None:
    wide, narrow = tiny("coop", epochs=3, accumulate=2, lr=0.1), tiny("coop", epochs=3, accumulate=1, lr=0.1)
    steps = {}
    for config in (wide, narrow):
        steps[config.trainer.accumulate] = torch.load(run(config).folder / "last.ckpt", weights_only=True)[
            "global_step"
        ]
    assert steps == {1: 6, 2: 3}


def test_all_that_is_missing_is_told_at_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop").with_data(root=str(tmp_path / "nowhere"))
    config = replace(config, backbone=replace(config.backbone, name="ViT-B-61"))
    with pytest.raises(ConfigError) as caught:
        run(config)
    text = one_screen(caught.value)
    assert text.startswith("two things are missing.\n\n1. ") and "\n\n2. " in text
    assert "nowhere" in text and "'ViT-B-16'" in text
    config = replace(config, backbone=replace(config.backbone, name="demo"))
    with pytest.raises(DataError, match="nowhere"):
        run(config)
    with pytest.raises(BackboneError, match="ViT-B-61"):
        run(replace(tiny("coop"), backbone=replace(config.backbone, name="ViT-B-61")))
    assert not (tmp_path / "runs").exists()


def test_all_wrong_values_are_told_at_once() -> None:
    recipe = {"epochs": 0, "lr": float("nan"), "batch_size": 3}
    values = {"data": {"shots": 0}, "recipe": recipe, "trainer": {"accumulate": 0, "devices": 2}, "seed": -1}
    with pytest.raises(ConfigError) as caught:
        RunConfig(**values)  # type: ignore[arg-type]
    text = one_screen(caught.value)
    for name in ("data.shots", "recipe.epochs", "recipe.lr", "trainer.accumulate", "seed", "recipe.batch_size"):
        assert f"{name} is" in text


def test_train_refuses_what_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop")
    task = load_dataset("folder", root=config.data.root, shots=2)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names[:2])
    with pytest.raises(ConfigError, match="made for 2 classes.*the data has 5.*create it with data.class_names"):
        vlprompt.train(method, task, output=str(tmp_path))
    method = vlprompt.create_method("coop", method.backbone, task.class_names)
    with pytest.raises(ConfigError, match="no key 'recipe.epoch'. Did you mean 'recipe.epochs'"):
        vlprompt.train(method, task, output=str(tmp_path), epoch=3)
    with pytest.raises(ConfigError, match="recipe.lr is 0"):
        vlprompt.train(method, task, output=str(tmp_path), lr=0)
    assert list(tmp_path.iterdir()) == []


def test_the_global_random_state_does_not_matter(tiny: Tiny, tmp_path: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = tiny(
            "coop", {"context_init": "", "context_length": 2}, transform="random", output=str(tmp_path / str(seed))
        )
        heads.append((run(config).head_dir / "head.safetensors").read_bytes())
    assert heads[0] == heads[1]


def test_harmonic_mean() -> None:
    assert harmonic_mean(80.0, 60.0) == pytest.approx(2 * 80 * 60 / 140)
    assert harmonic_mean(0.0, 0.0) == 0.0
