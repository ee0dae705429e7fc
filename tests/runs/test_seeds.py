"""What a seed draws: results that do not depend on it are the same for every seed, and are not given a deviation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.runs.test_every_run import configured
from vlprompt import list_methods
from vlprompt.config.run import RunConfig
from vlprompt.methods import get_method_class
from vlprompt.runs.dry_run import dry_run
from vlprompt.runs.run import Run, run
from vlprompt.runs.seeds import unused_draw
from vlprompt.runs.session import Session

Tiny = Callable[..., RunConfig]
UNTRAINED = [name for name in list_methods() if not get_method_class(name).by_recipe]
#: Settings without random views and crops, as far as a method has them.
FIXED = {"views": 0, "epoch_views": 0, "crops": 0, "augmix": False, "search": False}


def kept(config: RunConfig) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(config)


def outcome(done: Run) -> tuple[Any, dict[str, list[Any]]]:
    """The scores of a run, and the tensors of its head."""
    head = load_file(done.head_dir / "head.safetensors")
    return (done.folder / "confusion.csv").read_text(), {name: value.tolist() for name, value in head.items()}


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_run_that_draws_nothing_is_the_same_for_every_seed(name: str, image_folder: Path, tmp_path: Path) -> None:
    config = configured(name, image_folder, tmp_path)
    fields = get_method_class(name).Settings.__dataclass_fields__
    fixed = {key: value for key, value in FIXED.items() if key in fields}
    order = {"order": "file"} if name == "tda" else {}
    config = replace(config, settings={**config.settings, **fixed}).with_data(shots=-1, **order)
    first, second = kept(config), kept(replace(config, seed=2))
    draws = [done.results["seed_draws"] for done in (first, second)]
    assert draws[0] == draws[1] and (outcome(first) == outcome(second) or draws[0])
    assert bool(draws[0]) == bool(get_method_class(name).own_draws)


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("zeroshot", {}, ["seed 3", "data.shots 2"]),
        ("zero", {"crops": 3}, ["data.shots 2"]),
        ("tip_adapter", {"views": 0}, []),
        ("tfup", {"unlabelled": "test"}, ["seed 3", "data.shots 2"]),
        ("tfup", {"unlabelled": "train"}, []),
        ("coop", {}, []),
    ],
)
def test_a_seed_and_shots_without_effect_are_named(
    name: str, settings: dict[str, Any], found: list[str], tiny: Tiny
) -> None:
    config = tiny(name, settings, seed=3)
    note = unused_draw(Session(config).method, config)
    assert [line.partition(":")[0].strip(" -") for line in note.splitlines()[1:]] == found
    assert bool(note) == bool(found) and (not found or f"{len(found)} of the values" in note)


def test_a_run_and_a_dry_run_name_a_seed_without_effect(tiny: Tiny) -> None:
    for command in (run, dry_run):
        with pytest.warns(UserWarning, match=r"seed 3: zeroshot with these settings draws nothing at random"):
            command(tiny("zeroshot", seed=3))
