"""Values without effect: of recipes, against the rates of all steps, and of meta-trainings."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from vlprompt.config.meta import MetaConfig, MetaRunConfig, TasksConfig
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import convert, field_hints, make
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import ConfigError
from vlprompt.methods.zeroshot import ZeroShotSettings
from vlprompt.runs.effect import note, without_idle_meta

STEPS = 3  # per epoch
OTHERS = {"lr": 0.05, "final_lr": 0.005, "warmup_lr": 0.003}


def rates(recipe: RecipeConfig) -> list[float]:
    """The rate of every step of a training."""
    epochs = recipe.epochs or 0
    units = range(epochs * STEPS) if recipe.schedule == "step" else [at for at in range(epochs) for _ in range(STEPS)]
    return [learning_rate(at, recipe.lr, recipe, STEPS) for at in units]


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_a_recipe_names_the_values_that_change_no_rate(epochs: int, schedule: str) -> None:
    for warmup_epochs, warmup in itertools.product(range(epochs + 1), ("constant", "linear")):
        recipe = RecipeConfig(
            epochs=epochs,
            lr=0.01,
            schedule=schedule,
            warmup=warmup,
            warmup_epochs=warmup_epochs,  # type: ignore[arg-type]
        )
        others = {
            **OTHERS,
            "warmup": "linear" if warmup == "constant" else "constant",
            "schedule": "step" if schedule == "epoch" else "epoch",
        }
        same = {name for name, value in others.items() if rates(replace(recipe, **{name: value})) == rates(recipe)}
        assert set(recipe.without_effect()) == same, recipe


def test_warm_up_steps_have_no_first_rate() -> None:
    recipe = RecipeConfig(epochs=None, steps=9, schedule="step", warmup="linear", warmup_epochs=None, warmup_steps=3)
    assert set(recipe.without_effect()) == {"warmup_lr"}
    one, other = (
        [learning_rate(at, 0.01, replace(recipe, warmup_lr=rate), STEPS) for at in range(9)] for rate in (1e-5, 0.003)
    )
    assert one == other


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"settings": {"context_init": "one", "context_length": 9}}, ["settings.context_length"]),
        ({"objectives": {"knowledge": {"weight": 0.0, "variant": "paper"}}}, ["objectives.knowledge.variant"]),
        ({"tasks": TasksConfig(classes=7)}, ["tasks.classes"]),
        ({"tasks": TasksConfig(labels="clusters", classes=7)}, []),
        ({"meta": MetaConfig(inner_steps=0, inner_lr=0.5, order="second")}, ["meta.inner_lr", "meta.order"]),
        ({"meta": MetaConfig(regulator="sigmoid-gate", rank=3, bottleneck=2)}, ["meta.rank"]),
        ({"meta": MetaConfig(regulator="rescale-gate", rank=3, bottleneck=2)}, ["meta.bottleneck"]),
        ({"meta": MetaConfig(regulator="none", gate_bias=1.0, sharing="shape")}, ["meta.sharing", "meta.gate_bias"]),
    ],
)
def test_a_meta_training_names_what_has_no_effect(values: dict[str, object], keys: list[str]) -> None:
    config, lines = without_idle_meta(MetaRunConfig(**values))  # type: ignore[arg-type]
    assert [line.split()[0] for line in lines] == keys and without_idle_meta(config) == (config, [])
    assert all(line in note(lines) for line in lines)


@pytest.mark.parametrize("name", ["ensemble", "file", "descriptors"])
def test_a_reference_written_as_a_mapping_is_refused(name: str) -> None:
    hint = field_hints(ZeroShotSettings)["templates"]
    with pytest.raises(ValueError, match=f"'{name}' is no class; write '{name}:"):
        convert(hint, {name: "coop"})
    with pytest.raises(ConfigError, match=f"'{name}' is no class"):
        make(ZeroShotSettings, {"templates": [{name: ["coop"]}]})
    assert convert(hint, {name: "the ensemble.", "choir": "a choir."})
