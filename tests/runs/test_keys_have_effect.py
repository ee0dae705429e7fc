"""Every key of a run changes something for every method, is refused, or is named and left out of the record."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.runs.test_every_run import configured
from vlprompt import list_methods
from vlprompt.config.keys import RUN_KEYS, as_plain, merged, nest
from vlprompt.config.run import WHOLE_TRANSFORMS, RunConfig, TransformKind
from vlprompt.config.types import make
from vlprompt.errors import VlpromptError
from vlprompt.runs.effect import idle_keys, without_idle
from vlprompt.runs.run import complete, run
from vlprompt.runs.seeds import unused_draw
from vlprompt.runs.session import Session, completed

#: Another value of each key.
OTHERS: dict[str, Any] = {
    "recipe.epochs": 4,
    "recipe.steps": 5,
    "recipe.batch_size": 2,
    "recipe.drop_last": False,
    "recipe.lr": 0.03,
    "recipe.optimizer": "adam",
    "recipe.schedule": "step",
    "recipe.final_lr": 0.005,
    "recipe.warmup": "linear",
    "recipe.warmup_epochs": 2,
    "recipe.warmup_steps": 2,
    "recipe.warmup_lr": 0.002,
    "recipe.momentum": 0.5,
    "recipe.weight_decay": 0.1,
    "recipe.gradient_clip": 1e-4,
    "recipe.select": "best_val",
    "trainer.accumulate": 2,
    "data.shots": 1,
    "data.classes": "base",
    "data.transform": "random",
    "data.template": "a drawing of the {}.",
    "data.source": ["photo"],
    "data.target": ["photo"],
    "data.split": "split.json",
    "data.sampler": "elevater-v1",
    "data.shots_file": "shots.json",
    "data.cached_views": 2,
    "data.bank": "bank",
    "data.order": "file",
    "data.statistics": ["statistics.safetensors"],
    "data.orientation": "ignore",
    "data.background": "black",
    "backbone.precision": "bf16",
    "backbone.image_size": 96,
    "seed": 2,
}
#: Keys that name the run, its place, its machine or its log, or change results by rounding at most.
NEUTRAL = {
    *("method", "output", "init_from", "settings", "objectives", "decomposition"),
    *("data.name", "data.root", "data.workers", "data.on_bad_image", "backbone.name", "backbone.pretrained"),
    *("recipe.test_batch_size", "trainer.devices", "trainer.accelerator", "trainer.precision", "trainer.progress"),
    *("trainer.loggers", "recipe.validate_every"),
}
DRAWS = ("seed", "data.shots", "data.sampler", "data.shots_file")


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """``config`` with another value of ``key``, as the command line sets it."""
    own = {"recipe.steps": {"recipe.epochs": None}, "recipe.warmup_steps": {"recipe.warmup_epochs": None}}.get(key, {})
    together = {
        "recipe.warmup_steps": {"recipe.schedule": "step", "recipe.warmup": "linear"},
        "data.cached_views": {"data.transform": "random"},
    }.get(key, {})
    values = merged(as_plain(config), nest({key: value, **own, **together}))
    return make(RunConfig, values)


def named(config: RunConfig) -> list[str]:
    """The lines of the note on values of ``config`` without effect."""
    return without_idle(completed(config))[1]


def outcome(config: RunConfig) -> dict[str, Any]:
    """Return what a run computes and records, apart from its configuration."""
    done = run(config)
    head = load_file(done.head_dir / "head.safetensors")
    steps = done.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    # What echoes the configuration, or describes the draw.
    draw = ("shots", "seed", "sampler", "train", "val", "transform")
    return {
        "head": {name: value.tolist() for name, value in head.items()},
        "losses": [{name: value for name, value in row.items() if name not in ("seconds", "time")} for row in rows],
        "scores": [done.results[part] for part in ("results", "zeroshot")],
        "confusion": (done.folder / "confusion.csv").read_text(),
        "data": {name: value for name, value in done.results["data"].items() if not name.startswith(draw)},
        "backbone": done.results["backbone"],
        "classifier": done.results["zeroshot_classifier"],
        "drawn": done.results["seed_draws"],
    }


@pytest.fixture(scope="module")
def base(
    validated_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[RunConfig, dict[str, Any]]]:
    """``base("coop", key)``: a configuration of the method on which ``key`` is changed, and the outcome of its run."""
    output = tmp_path_factory.mktemp("keys")

    @functools.cache
    def of(name: str, transform: str) -> tuple[RunConfig, dict[str, Any]]:
        config = configured(name, validated_folder, output)
        recipe = dataclasses.replace(config.recipe, epochs=3, batch_size=4)
        config = dataclasses.replace(config, recipe=recipe).with_data(transform=transform)
        return config, outcome(config)

    return lambda name, key: of(name, "random" if key == "data.cached_views" else "center")


CASES = [(name, key) for name in list_methods() for key in OTHERS]


def test_every_key_of_a_run_is_tried_or_known_to_be_neutral() -> None:
    assert {*OTHERS, *NEUTRAL} == {*RUN_KEYS, *NEUTRAL} and not OTHERS.keys() & NEUTRAL


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("transform", WHOLE_TRANSFORMS)
def test_transforms_of_test_images_are_recorded_for_every_method(
    name: str, transform: TransformKind, tiny: Callable[..., RunConfig]
) -> None:
    assert complete(tiny(name, transform=transform)).data.transform == transform


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.covering(rows="name", every=12)
@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_key_changes_something_or_is_named(
    name: str, key: str, base: Callable[[str, str], tuple[RunConfig, dict[str, Any]]]
) -> None:
    config, before = base(name, key)
    verdict = verdict_on(key, config, before)
    assert verdict in ("refused", "named", "changes something")


def verdict_on(key: str, config: RunConfig, before: dict[str, Any]) -> str:
    """Return what another value of ``key`` does."""
    try:
        other = changed(config, key, OTHERS[key])
        if key in idle_keys(completed(other)):
            values = [as_plain(completed(one)) for one in (config, other)]
            said = values[0] == values[1] or any(key in line for one in (config, other) for line in named(one))
            return "named" if said and complete(other) == complete(config) else "recorded without effect"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            note = unused_draw(Session(other).method, other) if key in DRAWS else ""
        after = outcome(other)
        changes = after != before or (key == "seed" and bool(after["drawn"]))  # few images, and no vote may change
    except VlpromptError:
        return "refused"
    if f"- {key} " in note:
        return "named, but changes something" if changes else "named"
    return "changes something" if changes else "nothing"
