"""Adding a method takes one file and one recipe book, adding an objective one file; no list names either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def python(house: Path, *words: str) -> str:
    """Run Python in the house; what it printed."""
    env = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "VLPROMPT_CACHE": str(house / "cache")}
    done = subprocess.run([sys.executable, *words], cwd=house, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_listed_and_documented(house: Path) -> None:
    assert "\ntoy " in python(house, "-m", "vlprompt", "list", "methods")
    assert "--settings.strength" in python(house, "-m", "vlprompt", "train", "--method", "toy", "--help")


def test_an_objective_is_listed_and_trained(house: Path) -> None:
    assert "toy_term" in python(house, "-m", "vlprompt", "list", "objectives", "--names").split()
    words = "train --config configs/toy/demo.yaml --data.shots 1 --output terms --trainer.progress false"
    python(house, "-m", "vlprompt", *words.split(), "--objectives.toy_term.weight", "0.5")
    (results,) = house.glob("terms/**/results.json")
    assert json.loads(results.read_text())["config"]["objectives"] == {"toy_term": {"weight": 0.5}}


def test_it_is_resolved_for_every_data_set(house: Path) -> None:
    program = (
        "from vlprompt.cli.parse import read_command_line, source_of\n"
        "from vlprompt.datasets import list_datasets\n"
        "source = source_of(read_command_line(['--config', 'configs/toy']))\n"
        "for name in list_datasets(): print(name, source.resolve(dataset=name).recipe.epochs)\n"
    )
    epochs = dict(line.split() for line in python(house, "-c", program).splitlines())
    assert len(epochs) > 40 and (epochs["imagenet"], epochs["demo-2"], epochs["dtd"]) == ("2", "2", "9")


def test_it_is_trained_and_saved(house: Path) -> None:
    words = "train --config configs/toy/demo.yaml --data.shots 1 --output runs --trainer.progress false"
    python(house, "-m", "vlprompt", *words.split())
    (folder,) = (path.parent for path in house.glob("runs/**/results.json"))
    assert json.loads((folder / "results.json").read_text())["results"]
    loaded = (
        f"import vlprompt; head = vlprompt.load_head({str(folder)!r}); print(head.method.name, head.method.shift.shape)"
    )
    assert "toy torch.Size([" in python(house, "-c", loaded)


def test_it_enters_the_shared_suite(house: Path) -> None:
    said = python(
        house, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "toy", "-o", "pythonpath=",
        str(ROOT / "tests" / "methods" / "test_every_method.py"),
    )  # fmt: skip
    passed = int(said.split(" passed")[0].split()[-1])
    assert passed > 25 and "failed" not in said
