"""tools/check_runs.py on the archives in tests/golden_runs, and on archives that a loop of plain torch makes.

The loop has its own optimiser, schedule and order of images. It shares the methods' loss terms with the product, which
the golden tensors check, and makes archives of other methods, optimisers, settings, classes and numbers of images.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vlprompt
from tests.fixtures.runs import cache, image_folder, one_demo
from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask, load_dataset

__all__ = ["cache", "image_folder", "one_demo"]
RUNS = Path(__file__).parent / "golden_runs"
TOOL = Path(__file__).parents[1] / "tools" / "check_runs.py"
STEPS = {"coop": None, "kgcoop": None, "cocoop": 3, "maple": 4}
"""Steps of each archive that are trained here; None for the whole run."""


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_runs", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- runs of the official trainers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(path.stem for path in RUNS.glob("*.npz")))
def test_training_agrees(tool: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = STEPS.get(name, 3)
    assert tool.main([str(RUNS / f"{name}.npz"), *([] if steps is None else ["--steps", str(steps)])]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert float(last.rpartition(" ")[2]) <= 1e-4
    assert {"losses", "rates"} <= {line.split()[0] for line in lines}
    if steps is None:
        right, total, expected, _ = map(int, re.findall(r"(\d+) of (\d+).*?(\d+) of (\d+)", lines[-1])[0])
        assert right == expected and total == 450


# -- runs of a plain loop ---------------------------------------------------------------------------------------------
BASE = {"seed": 3, "backbone": "demo"}
# Settings of archives, under former names, and their names today.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "promptsrc": (
        "promptsrc",
        {"text_depth": 3, "image_depth": 2, "text_weight": 3.0, "aggregation_mean": 2, "aggregation_deviation": 1},
        {
            "text_depth": 3,
            "image_depth": 2,
            "self_regularisation": {"text": 3.0},
            "aggregation": {"mean": 2, "deviation": 1},
        },
        {"epochs": 3, "lr": 0.01, "batch_size": 4, "warmup_epochs": 1, "warmup_lr": 1e-4},
    ),
    "promptsrc without aggregation": (
        "promptsrc",
        {"image_depth": 1, "aggregate": False},
        {"image_depth": 1, "aggregation": None},
        {"epochs": 2, "lr": 0.02, "batch_size": 16, "warmup_epochs": 1, "warmup_lr": 1e-3},
    ),
    "prograd": (
        "prograd",
        {"context_length": 3, "strength": 0.5, "templates": ["a photo of a {}."]},
        {"context_length": 3, "projected_gradient": {"strength": 0.5, "templates": ["a photo of a {}."]}},
        {"epochs": 4, "lr": 0.05, "batch_size": 4, "warmup_epochs": 2, "warmup_lr": 1e-4},
    ),
    "clip_lora": (
        "clip_lora",
        {"rank": 3, "params": ["q", "o"], "position": "bottom", "dropout": 0.0},
        {"rank": 3, "params": ["q", "o"], "position": "bottom", "dropout": 0.0},
        {
            "epochs": 2,
            "lr": 1e-3,
            "final_lr": 1e-5,
            "batch_size": 4,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "schedule": "step",
            "warmup_epochs": 0,
        },
    ),
}  # fmt: skip


def rate(recipe: dict[str, Any], epoch: int, step: int, steps: int) -> float:
    at, total = (step, steps * recipe["epochs"]) if recipe.get("schedule") == "step" else (epoch, recipe["epochs"])
    if epoch < recipe["warmup_epochs"]:
        return float(recipe["warmup_lr"])
    final = float(recipe.get("final_lr", 0.0))
    return final + (recipe["lr"] - final) * (1 + math.cos(math.pi * (at - recipe["warmup_epochs"]) / total)) / 2


def optimiser(parameters: list[torch.Tensor], recipe: dict[str, Any]) -> torch.optim.Optimizer:
    if recipe.get("optimizer") == "adamw":
        return torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=recipe["weight_decay"])
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=5e-4)


def pictures(task: FewShotTask, split: str, preprocess: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images of a split in the order of the task's list, and their labels."""
    given = dataclasses.replace(task, test=getattr(task, split))
    data = FewShotData(given, preprocess, transform="center", workers=0, test_batch_size=1000)
    (batch,) = data.test_dataloader()
    return batch["images"], batch["labels"]


def archive_of(case: str, root: Path, path: Path, **data: Any) -> Path:
    """Train a case by the plain loop, and write its archive."""
    name, former, settings, recipe = CASES[case]
    data = {"name": "folder", "root": str(root), "shots": 3, "classes": "all", **data}
    task = load_dataset(**data, seed=BASE["seed"])
    backbone = vlprompt.load_backbone("demo")
    torch.manual_seed(5)
    method = vlprompt.create_method(
        name, backbone, task.class_names, data_template=task.template, **settings
    ).train()  # fmt: skip
    parameters = dict(method.trainable_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn_like(parameter)
    start = {f"start/{key}": value.detach().numpy().copy() for key, value in parameters.items()}
    images, labels = pictures(task, "train", backbone.preprocess)
    size = min(recipe["batch_size"], len(images))
    steps = len(images) // size
    order = np.stack([np.random.RandomState(epoch).permutation(len(images)) for epoch in range(recipe["epochs"])])
    order = order[:, : steps * size]  # an incomplete last batch is dropped
    step_of, losses, rates = optimiser(list(parameters.values()), recipe), [], []
    for epoch, row in enumerate(order):
        for number, rows in enumerate(torch.from_numpy(row).split(size)):
            rates.append(rate(recipe, epoch, epoch * steps + number, steps))
            for group in step_of.param_groups:
                group["lr"] = rates[-1]
            loss = sum(method.losses(images[rows], labels[rows]).values())
            step_of.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            step_of.step()
            losses.append(loss.item())
        method.epoch_end(epoch, recipe["epochs"])
    method.train_end()
    method.eval()
    correct = {}
    halves = {"base": task, "new": task.counterpart()} if task.classes == "base" else {task.classes: task}
    for classes, half in halves.items():
        tests, expected = pictures(half, "test", backbone.preprocess)
        with torch.no_grad():
            right = method.with_classes(half.class_names)(tests).argmax(dim=-1) == expected
        correct[f"{classes}_correct"] = [int(right.sum()), len(right)]
    data["view"] = "center"
    meta = {"method": name, "settings": former, "data": data, "recipe": recipe, **BASE, **correct, "kind": "test"}
    end = {f"end/{key}": value.detach().numpy() for key, value in parameters.items()}
    facts = {"losses": np.array(losses), "rates": np.array(rates), "order": order.astype(np.int32)}
    np.savez(path, meta=json.dumps(meta), **start, **end, **facts)
    return path


@pytest.mark.parametrize(("case", "classes"), [(case, "all") for case in CASES] + [("prograd", "base")])
def test_runs_of_other_methods_agree(
    tool: Any, case: str, classes: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive_of(case, image_folder, tmp_path / "run.npz", classes=classes)
    assert tool.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert float(text.split()[-1]) <= 1e-4
    with np.load(path, allow_pickle=False) as file:
        names = {name for name in file.files if name.startswith("end/")}
    halves = ["base_correct", "new_correct"] if classes == "base" else ["all_correct"]
    assert {line.split()[0] for line in text.splitlines()[1:-1]} == {"losses", "rates", *names, *halves}


def test_a_fitted_method_agrees(
    tool: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TaskRes by Adam on the frozen features; its official trainer is Dassl's, too."""
    task = load_dataset("folder", root=str(image_folder), shots=3, seed=3)
    backbone = vlprompt.load_backbone("demo")
    images, labels = pictures(task, "train", backbone.preprocess)
    tests, expected = pictures(task, "test", backbone.preprocess)
    with torch.no_grad():
        features, test_features = (F.normalize(backbone.encode_image(x), dim=-1) for x in (images, tests))
        text = vlprompt.create_method("taskres", backbone, task.class_names, templates=[task.template]).text_weights()
    scale = backbone.logit_scale.detach()
    residual = torch.zeros_like(text, requires_grad=True)
    step_of, losses, rates = torch.optim.Adam([residual], weight_decay=5e-4), [], []
    recipe = {"epochs": 3, "lr": 0.01, "batch_size": 4, "warmup_epochs": 1, "warmup_lr": 1e-5}
    order = np.stack([np.random.RandomState(epoch).permutation(len(images)) for epoch in range(3)])[:, :12]

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return scale * rows @ F.normalize(text + 0.5 * residual, dim=-1).t()

    for epoch, row in enumerate(order):
        for rows in torch.from_numpy(row).split(4):
            rates.append(rate(recipe, epoch, 0, 0))
            step_of.param_groups[0]["lr"] = rates[-1]
            loss = F.cross_entropy(logits(features[rows]), labels[rows])
            step_of.zero_grad()
            loss.backward()
            step_of.step()
            losses.append(loss.item())
    settings = {"alpha": 0.5, "views": 0, "epochs": 3, "lr": 0.01, "batch_size": 4}
    data = {"name": "folder", "root": str(image_folder), "shots": 3, "view": "center"}
    right = [int((logits(test_features).argmax(dim=-1) == expected).sum()), len(expected)]
    meta = {"method": "taskres", "settings": settings, "data": data, **BASE, "all_correct": right}
    end = {"end/cache.residual": residual.detach().numpy()}
    facts = {"losses": np.array(losses), "rates": np.array(rates), "order": order}
    np.savez(tmp_path / "run.npz", meta=json.dumps(meta), **end, **facts)
    assert tool.main([str(tmp_path / "run.npz")]) == 0
    assert float(capsys.readouterr().out.split()[-1]) <= 1e-4


# -- what is found ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def archive(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = archive_of("prograd", image_folder, tmp_path_factory.mktemp("archive") / "run.npz", classes="base")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def changed(name: str, at: Any, by: float) -> Change:
    def change(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        arrays[name][at] *= 1 + by

    return change


FOUND: dict[str, tuple[Change, str]] = {
    "a loss": (changed("losses", 2, 3e-4), r"losses +3.0e-04"),
    "a rate": (changed("rates", 3, 3e-4), r"rates +3.0e-04"),
    "an end": (changed("end/prompt.ctx", ..., 3e-4), r"end/prompt.ctx +3.0e-04"),
    "the start": (changed("start/prompt.ctx", ..., 0.1), "losses +[0-9.]+e-0[0-3]"),
    "the order": (lambda arrays, meta: arrays.update(order=arrays["order"][::-1]), "end/prompt.ctx +[0-9.]+e-0[0-4]"),
    "the rate of the recipe": (lambda arrays, meta: meta["recipe"].update(lr=0.06), "rates +[0-9.]+e-01"),
    "the warm-up": (lambda arrays, meta: meta["recipe"].update(warmup_epochs=1), "rates +"),
    "the epochs": (lambda arrays, meta: meta["recipe"].update(epochs=3), "6 steps in place of 8"),
    "a setting": (lambda arrays, meta: meta["settings"].update(strength=1.0), "losses +"),
    "the hits": (lambda arrays, meta: meta.update(base_correct=[99, 9]), r"base_correct \[\d+, 9\] in place of \[99"),
    "hits of new classes": (lambda arrays, meta: meta.update(new_correct=[99, 4]), r"new_correct \[\d+, 4\] in place"),
    "another array": (lambda arrays, meta: arrays.update(more=np.zeros(1)), "more was not compared"),
    "no end": (lambda arrays, meta: arrays.pop("end/prompt.ctx"), "end/prompt.ctx is not in the archive"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_differences_are_found(
    tool: Any, archive: dict[str, Any], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOUND[what]
    arrays = {name: value.copy() for name, value in archive.items() if name != "meta"}
    meta = json.loads(archive["meta"].item())
    change(arrays, meta)
    np.savez(tmp_path / "run.npz", meta=json.dumps(meta), **arrays)
    assert tool.main([str(tmp_path / "run.npz")]) == 1
    assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, meta: arrays.pop("rates"), "it has no rates"),
        (lambda arrays, meta: arrays.pop("start/prompt.ctx"), "no start/ of prompt.ctx, which prograd trains"),
        (lambda arrays, meta: arrays["order"].fill(1), "each once"),
        (lambda arrays, meta: arrays.update(order=arrays["order"][:, :5]), "order has 5 images an epoch"),
        (lambda arrays, meta: meta["settings"].update(strenght=1.0), "strenght"),
        (lambda arrays, meta: meta.update(method="coopp"), "there is no method 'coopp'. Did you mean 'coop'"),
    ],
    ids=["no rates", "no start", "an image twice", "fewer images", "a setting", "a method"],
)  # fmt: skip
def test_archives_that_cannot_be_run_are_refused(
    tool: Any, archive: dict[str, Any], change: Change, message: str, tmp_path: Path
) -> None:
    arrays = {name: value.copy() for name, value in archive.items() if name != "meta"}
    meta = json.loads(archive["meta"].item())
    change(arrays, meta)
    np.savez(tmp_path / "run.npz", meta=json.dumps(meta), **arrays)
    with pytest.raises(SystemExit, match=message):
        tool.main([str(tmp_path / "run.npz")])


@pytest.mark.parametrize("program", ["check_runs", "check_golden"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 cut", "damaged"),
        ({"losses": np.zeros(3)}, "no meta"),
        ({"meta": np.array("{")}, "damaged"),
        ({"meta": np.array("[]")}, "not a JSON object"),
        ({"meta": np.array({}, dtype=object)}, "damaged"),
    ],
)
def test_a_damaged_archive_is_named(program: str, content: Any, words: str, tool: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    main = tool.main if program == "check_runs" else importlib.import_module("check_golden").main
    with pytest.raises(SystemExit, match=rf"run.npz: it .*{words}|run.npz: its meta .*{words}"):
        main([str(path)])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_differ(wrong: float, tool: Any) -> None:
    good, bad = np.ones(2), np.array([1.0, wrong])
    assert tool.step_error(good, good) == 0
    assert tool.step_error(good, bad) == tool.step_error(bad, good) == tool.step_error(bad, bad) == math.inf
