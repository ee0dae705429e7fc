"""DiffTPT from a folder of images to a table: a bank filled by a tiny random pipeline, then runs that use it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.cli.bank import bank
from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.generation.recipe import Recipe, read_recipe
from vlprompt.runs.run import evaluate_head, run

Tiny = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with two generated images of every test image."""
    place = tmp_path_factory.mktemp("bank")
    words = f"--bank {place} --data.name folder --data.root {image_folder} --pipeline tiny --count 2 --steps 2"
    assert bank(words.split()) == 0
    return place


def configured(tiny: Tiny, folder: Path | None, generated: int) -> RunConfig:
    config = tiny("difftpt", settings={"crops": 7, "generated": generated}, epochs=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, bank=folder and str(folder)))


def test_a_run_uses_the_bank(tiny: Tiny, folder: Path) -> None:
    done = run(configured(tiny, folder, 2))
    assert done.results["test_images"] == "test-tuned" and "test-tuned" in done.table()
    assert done.results["config"]["data"]["bank"] == str(folder)
    assert done.results["results"]["all"]["total"] == 13
    assert run(configured(tiny, folder, 2)).reused


def test_without_a_bank_or_with_too_small_a_one(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`vlprompt bank`.*--settings\.generated 0"):
        run(configured(tiny, None, 2))
    with pytest.raises(VlpromptError, match="2 of the 3 generated images"):
        run(configured(tiny, folder, 3))
    with pytest.raises(VlpromptError, match="nowhere"):
        run(configured(tiny, tmp_path / "nowhere", 2))


def test_a_bank_of_another_recipe_is_not_taken_for_the_run_s(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    (own,) = folder.glob("*/recipe.json")
    shutil.copytree(own.parent, tmp_path / "other")
    recipe = read_recipe(own.read_text(encoding="utf-8"), str(own))
    text = Recipe({**recipe.facts, "seed": 7}, recipe.about).text()
    (tmp_path / "other" / "recipe.json").write_text(text, encoding="utf-8")
    done, config = run(configured(tiny, folder, 2)), configured(tiny, tmp_path / "other", 2)
    with pytest.raises(ConfigError, match="was started from another bank;.*another --output"):
        run(config)
    with pytest.warns(UserWarning, match=f"images of the recipe .*the head's run were of {recipe.id[:16]}"):
        evaluate_head(done.folder, config.data)


def test_without_generated_images_no_bank_is_needed(tiny: Tiny) -> None:
    assert run(configured(tiny, None, 0)).results["results"]
