"""Tiny runs: a folder of 5 classes cut from the demo's pictures, with odd numbers of test images."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.data import load_dataset
from vlprompt.engine.config import BackboneConfig, DataConfig, RecipeConfig, RunConfig, TrainerConfig
from vlprompt.evaluation.folder import run_folder
from vlprompt.evaluation.run import complete

ROOT = Path(__file__).parents[2]
TRAIN, TEST = 4, (3, 2, 4, 3, 1)  # test images: base (3 classes) 9, new 4, all 13
MIXTURE = {
    "templates": ["an emoji of a {}.", "a photo of a {}.", "a cartoon {}."],
    "groups": [1, 1, 1],
    "tune_layer_norms": False,
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Features are kept in a folder of this session's, for these processes and those they start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("VLPROMPT_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout train/<class>/*.png, test/<class>/*.png."""
    folder = tmp_path_factory.mktemp("pictures")
    demo = load_dataset("demo", shots=1)
    for name, tests in zip(sorted(demo.class_names[: len(TEST)]), TEST, strict=True):  # the folder reader sorts, too
        own = [sample for sample in demo.test if demo.class_names[sample.label] == name]
        for number, sample in enumerate(own[: TRAIN + tests]):
            place = folder / ("train" if number < TRAIN else "test") / name
            place.mkdir(parents=True, exist_ok=True)
            sample.source.open().save(place / f"{number}.png")
    return folder


@pytest.fixture
def tiny(pictures: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``tiny("coop", epochs=2, shots=2, ...)``: a run of seconds; settings, data and recipe fields by their names."""

    def build(method: str = "coop", settings: dict[str, Any] | None = None, **values: Any) -> RunConfig:
        def chosen(kind: type) -> dict[str, Any]:
            return {f.name: values.pop(f.name) for f in dataclasses.fields(kind) if f.name in values}

        own = {"coop": {"context_init": "an emoji of a"}, "mocoop": MIXTURE}.get(method, {})
        data = {"shots": 2, "view": "center", **chosen(DataConfig)}
        recipe = {"epochs": 2, "batch_size": 4, **chosen(RecipeConfig)}
        trainer = {"accelerator": "cpu", "progress": False, **chosen(TrainerConfig)}
        return RunConfig(
            method=method,
            settings={**own, **(settings or {})},
            backbone=BackboneConfig("demo", None),
            data=DataConfig("folder", str(pictures), **data),
            recipe=RecipeConfig(**recipe),
            trainer=TrainerConfig(**trainer),
            **{"output": str(tmp_path / "runs"), **values},
        )

    return build


@pytest.fixture
def folder_of() -> Callable[[RunConfig], Path]:
    """The run folder of a configuration."""
    return lambda config: run_folder(complete(config))


@pytest.fixture
def command() -> Callable[..., subprocess.Popen[str]]:
    """``command("tools/train.py", ...)``: Python started in the repository with these words."""

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        hidden = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in hidden} | environment
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start
