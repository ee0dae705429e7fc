"""Adding a method takes one file and one recipe book, adding an objective one file; no list names either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOY = '''"""Toy: a learned factor on every class of the zero-shot classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import NonNegative, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts.zero_shot import template_features


@validated("settings")
class ToySettings:
    """Settings of the toy.

    Attributes:
        strength: Size of the first shift.
    """

    strength: NonNegative = 0.1


@register("toy")
class Toy(PromptMethod):
    """One vector that all class weights are moved by."""

    Settings = ToySettings
    recipe = RecipeConfig(epochs=9)
    settings: ToySettings

    def build(self) -> None:
        """Create the vector."""
        dim = self.backbone.embed_dim
        self.shift = nn.Parameter(torch.full((dim,), self.settings.strength / dim**0.5))
        text = template_features(self.backbone, self.class_names, ["a photo of a {}."])
        self.register_buffer("text", text, persistent=False)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the moved weights ``[C, D]``."""
        return F.normalize(self.get_buffer("text") + self.shift, dim=-1)
'''


TERM = '''"""Toy term: the mean squared trainable parameter."""

from __future__ import annotations

from vlprompt.config.types import NonNegative, validated
from vlprompt.objectives.base import Objective, Step, Terms, register_objective


@validated("objectives.toy_term")
class ToyTermSettings:
    """Settings of the term.

    Attributes:
        weight: Factor of the term.
    """

    weight: NonNegative = 1.0


@register_objective("toy_term")
class ToyTerm(Objective):
    """Adds ``weight`` times the mean squared parameter."""

    Settings = ToyTermSettings
    settings: ToyTermSettings

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the term ``toy``."""
        squares = [parameter.square().mean() for _, parameter in self.host.trainable_parameters()]
        return {**terms, "toy": self.settings.weight * sum(squares) / len(squares)}
'''
BOOK = """\
# Toy (arXiv 0000.00000).
# Run: vlprompt train --config toy --data.name dtd
method: toy
recipe: {lr: 0.1}
datasets:
  imagenet: {recipe: {epochs: 2}}
  demo*: {backbone: {name: demo}, data: {transform: center}, recipe: {epochs: 2}}
"""


# What users type, in one process: each command of its own would import everything again.
PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path

import pytest
import vlprompt
from vlprompt.cli.main import main
from vlprompt.cli.parse import read_command_line, source_of

images, suite = sys.argv[1:]

def printed(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = main(words)
    assert status == 0, (words, text.getvalue())
    return text.getvalue()

def trained(output, *more):
    words = ["train", "--config", "configs/toy", "--data.name", "folder", "--data.root", images, "--data.shots", "1"]
    words += ["--backbone.name", "demo", "--data.transform", "center", "--output", output]
    printed(*words, "--trainer.progress", "false", "--trainer.accelerator", "cpu", *more)

trained("runs")
trained("terms", "--objectives.toy_term.weight", "0.5")
source = source_of(read_command_line(["--config", "configs/toy"]))
(results,) = Path("runs").rglob("results.json")
method = vlprompt.load_head(results.parent).method
found = {
    "head": [method.name, list(method.shift.shape)],
    "methods": printed("list", "methods"),
    "help": printed("train", "--method", "toy", "--help"),
    "objectives": printed("list", "objectives", "--names"),
    "demo": printed("train", "--config", "configs/toy/demo.yaml", "--dry-run"),
    "epochs": {name: source.resolve(dataset=name).recipe.epochs for name in vlprompt.list_datasets()},
    "suite": int(pytest.main(["-p", "no:xdist", "-p", "no:cacheprovider", "-k", "toy", "-o", "pythonpath=", suite])),
}
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package by links, with one real file more."""
    folder = tmp_path_factory.mktemp("house")
    packages = ("methods", "objectives")
    (folder / "vlprompt").mkdir()
    for source in (ROOT / "vlprompt").iterdir():
        if source.name not in (*packages, "__pycache__"):
            (folder / "vlprompt" / source.name).symlink_to(source)
    for package in packages:
        (folder / "vlprompt" / package).mkdir()
        for source in (ROOT / "vlprompt" / package).glob("*.py"):
            (folder / "vlprompt" / package / source.name).symlink_to(source)
    (folder / "vlprompt" / "methods" / "toy.py").write_text(TOY)
    (folder / "vlprompt" / "objectives" / "toy_term.py").write_text(TERM)
    (folder / "configs" / "toy").mkdir(parents=True)
    (folder / "configs" / "toy" / "base.yaml").write_text(BOOK)
    return folder


@pytest.fixture(scope="module")
def found(house: Path, image_folder: Path) -> dict[str, Any]:
    """What the program found, and in ``said`` what it printed otherwise."""
    env = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "VLPROMPT_CACHE": str(house / "cache")}
    words = [sys.executable, "-c", PROGRAM, str(image_folder), str(ROOT / "tests" / "methods" / "test_every_method.py")]
    done = subprocess.run(words, cwd=house, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {**json.loads((house / "found.json").read_text()), "said": done.stdout}


def test_it_is_listed_and_documented(found: dict[str, Any]) -> None:
    assert "\ntoy " in found["methods"]
    assert "--settings.strength" in found["help"]


def test_an_objective_is_listed_and_trained(found: dict[str, Any], house: Path) -> None:
    assert "toy_term" in found["objectives"].split()
    (results,) = house.glob("terms/**/results.json")
    assert json.loads(results.read_text())["config"]["objectives"] == {"toy_term": {"weight": 0.5}}
    (metrics,) = house.glob("terms/**/metrics.jsonl")
    assert "train/toy" in metrics.read_text()


def test_it_is_resolved_for_every_data_set(found: dict[str, Any]) -> None:
    epochs = found["epochs"]
    assert len(epochs) > 40 and (epochs["imagenet"], epochs["demo-2"], epochs["dtd"]) == (2, 2, 9)
    assert "x 2 epochs" in found["demo"]


def test_it_is_trained_and_saved(found: dict[str, Any], house: Path) -> None:
    (results,) = house.glob("runs/**/results.json")
    assert json.loads(results.read_text())["results"]
    name, (width,) = found["head"]
    assert name == "toy" and width > 0


def test_it_enters_the_shared_suite(found: dict[str, Any]) -> None:
    passed = int(found["said"].split(" passed")[0].split()[-1])
    assert passed > 25 and found["suite"] == 0
