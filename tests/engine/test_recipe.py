"""The schedule compared with tables of published rates, and the optimisers with their formulas."""

import math
from typing import Any

import pytest
import torch

from vlprompt.config.run import RecipeConfig
from vlprompt.engine.recipe import learning_rate, make_optimizer
from vlprompt.errors import ConfigError

# Epochs, base rate, and rates by epoch (counted from 0), as Dassl's schedule gives them.
TABLE = [
    (2, 0.0026, {0: 1e-5, 1: 0.0026}),
    (5, 0.0035, {0: 1e-5, 1: 0.0035, 2: 0.0031658, 3: 0.0022908, 4: 0.0012092}),
    (
        10,
        0.002,
        dict(
            enumerate(
                [1e-5, 0.002, 0.0019511, 0.001809, 0.0015878, 0.001309, 0.001, 0.00069098, 0.00041222, 0.00019098]
            )
        ),
    ),
    (20, 0.0025, {0: 1e-5, 1: 0.0025, 2: 0.0024846, 17: 0.00023873, 18: 0.00013624, 19: 0.000061179}),
    (50, 0.002, {0: 1e-5, 49: 7.8853e-6}),
    (200, 0.002, {0: 1e-5, 199: 4.9344e-7}),
]


@pytest.mark.parametrize(("epochs", "lr", "rates"), TABLE)
def test_rates_match_the_published_schedule(epochs: int, lr: float, rates: dict[int, float]) -> None:
    recipe = RecipeConfig(epochs=epochs, lr=lr)
    for epoch, rate in rates.items():
        assert learning_rate(epoch, lr, recipe) == pytest.approx(rate, rel=5e-5), f"epoch {epoch}"


@pytest.mark.parametrize(
    ("epochs", "warmup", "last"), [(10, 1, 0.0955), (50, 1, 0.00394), (50, 5, 0.0351), (25, 3, 0.0618)]
)
def test_closed_form_at_the_ends(epochs: int, warmup: int, last: float) -> None:
    recipe = RecipeConfig(epochs=epochs, lr=1.0, warmup_epochs=warmup)
    assert [learning_rate(epoch, 1.0, recipe) for epoch in range(warmup)] == [1e-5] * warmup
    assert learning_rate(warmup, 1.0, recipe) == 1.0
    assert learning_rate(epochs - 1, 1.0, recipe) == pytest.approx(last, abs=5e-5)


def test_without_warmup_the_cosine_starts_at_once() -> None:
    recipe = RecipeConfig(epochs=2, lr=1.0, warmup_epochs=0)
    assert [learning_rate(epoch, 1.0, recipe) for epoch in range(2)] == [1.0, pytest.approx(0.5)]


def test_a_schedule_by_step_is_torchs_cosine_annealing() -> None:
    """CLIP-LoRA: from 2e-4 to 1e-6 over all steps."""
    recipe = RecipeConfig(epochs=4, lr=2e-4, schedule="step", final_lr=1e-6, warmup_epochs=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-6)
    for step in range(20):
        assert learning_rate(step, 2e-4, recipe, per_epoch=5) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        reference.step()
    warm = RecipeConfig(epochs=4, lr=1.0, schedule="step", warmup_epochs=1)
    assert [learning_rate(step, 1.0, warm, per_epoch=5) for step in range(6)] == [1e-5] * 5 + [1.0]
    assert learning_rate(3, 0.0, warm, per_epoch=5) == 0.0


def test_a_linear_warm_up_by_epoch_is_dassls() -> None:
    """BlackVIP's VP (configs/trainers/VPWB/vit_b16.yaml): 0.1 in the first epoch, then 40 * epoch / 100."""
    recipe = RecipeConfig(epochs=1000, lr=40.0, warmup="linear", warmup_epochs=100, warmup_lr=0.1)
    rates = [learning_rate(epoch, 40.0, recipe) for epoch in range(1000)]
    assert rates[:3] == pytest.approx([0.1, 0.4, 0.8])
    assert rates[50] == pytest.approx(20.0) and rates[99] == pytest.approx(39.6) and rates[100] == 40.0
    assert rates[101:] == pytest.approx([20 * (1 + math.cos(math.pi * at / 1000)) for at in range(1, 900)])
    constant = RecipeConfig(epochs=1000, lr=40.0, warmup_epochs=100, warmup_lr=0.1)
    assert {learning_rate(epoch, 40.0, constant) for epoch in range(100)} == {0.1}
    by_step = RecipeConfig(epochs=4, lr=1.0, schedule="step", warmup="linear", warmup_epochs=1, warmup_lr=0.1)
    assert [learning_rate(step, 1.0, by_step, per_epoch=5) for step in range(6)] == [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_warm_up_steps_are_vps() -> None:
    """VP (hjbahng/visual_prompting, utils.py): on a line to the rate, then a cosine over the rest of the steps."""
    recipe = RecipeConfig(epochs=1000, lr=40.0, schedule="step", warmup_steps=1000)
    assert (recipe.warmup, recipe.warmup_epochs) == ("linear", None)
    rates = {step: learning_rate(step, 40.0, recipe, per_epoch=7) for step in (0, 1, 499, 999, 1000, 4000, 6999)}
    assert rates == pytest.approx(
        {0: 0.04, 1: 0.08, 499: 20.0, 999: 40.0, 1000: 40.0, 4000: 20.0, 6999: 20 * (1 - math.cos(math.pi / 6000))}
    )
    steps = RecipeConfig(steps=7000, lr=40.0, schedule="step", warmup_steps=1000)
    assert {step: learning_rate(step, 40.0, steps) for step in rates} == rates
    assert learning_rate(499, 4.0, recipe, per_epoch=7) == pytest.approx(2.0), "a group with a tenth of the rate"


def test_steps_are_the_length_of_a_schedule() -> None:
    """CLIP-LoRA at one shot: 500 steps, whatever the number of batches (MaxZanella/CLIP-LoRA, lora.py)."""
    recipe = RecipeConfig(steps=500, lr=2e-4, schedule="step", final_lr=1e-6, warmup_epochs=0, drop_last=False)
    assert recipe.epochs is None
    for per_epoch in (2, 13, 500):
        assert learning_rate(250, 2e-4, recipe, per_epoch) == pytest.approx((2e-4 + 1e-6) / 2)
    assert recipe.length(47) == (250, 500) and recipe.length(1000) == (16, 500)
    by_epoch = RecipeConfig(steps=500, lr=1.0, warmup_epochs=0)
    assert learning_rate(125, 1.0, by_epoch, per_epoch=2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("images", "accumulate", "dropped", "kept"),
    [(10, 1, 2, 3), (12, 1, 3, 3), (3, 1, 1, 1), (10, 2, 1, 2), (0, 1, 0, 0)],
)
def test_steps_per_epoch(images: int, accumulate: int, dropped: int, kept: int) -> None:
    for drop_last, steps in ((True, dropped), (False, kept)):
        assert RecipeConfig(batch_size=4, drop_last=drop_last).steps_per_epoch(images, accumulate) == steps


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"epochs": 5, "steps": 10}, "recipe.epochs is 5 and recipe.steps is 10; accepted: a number for one of them"),
        ({"epochs": None}, "recipe.epochs is null and recipe.steps is null"),
        (
            {"warmup_epochs": 1, "warmup_steps": 2, "schedule": "step"},
            "recipe.warmup_epochs is 1 and recipe.warmup_steps is 2",
        ),
        ({"warmup_epochs": None}, "recipe.warmup_epochs is null and recipe.warmup_steps is null"),
        ({"warmup_steps": 5}, "recipe.warmup_steps is 5 and recipe.schedule is 'epoch'; accepted: step"),
        ({"warmup_steps": 5, "schedule": "step", "warmup": "constant"}, "recipe.warmup is 'constant', but the rate"),
        ({"warmup_steps": 5, "schedule": "step", "steps": 4}, "recipe.warmup_steps is 5; accepted: 0 to recipe.steps"),
        ({"warmup_epochs": 5, "epochs": 4}, "recipe.warmup_epochs is 5; accepted: 0 to recipe.epochs (4)"),
        ({"select": "best"}, "recipe.select is 'best'; accepted: 'last' or 'best_val'"),
        ({"steps": 0}, "recipe.steps is 0; accepted: a whole number of 1 or more, or null"),
    ],
)
def test_contradictory_keys_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RecipeConfig(**values)
    assert str(caught.value).startswith(problem) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimisers_follow_their_formulas(name: str) -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    recipe = RecipeConfig(optimizer=name, lr=0.1, momentum=0.9, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = make_optimizer([{"params": [parameter], "lr": 0.1}], recipe)
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # The first step of Adam has the length of the rate; AdamW adds its decay.
    expected = {"sgd": 2 - 0.1 * (3 + 0.5 * 2), "adam": 2 - 0.1, "adamw": 2 * (1 - 0.1 * 0.5) - 0.1}
    assert float(parameter.detach()) == pytest.approx(expected[name], rel=1e-6)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.1)


def test_all_unaccepted_values_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        RecipeConfig(optimizer="lion", schedule="batch", final_lr=0.1)  # type: ignore[arg-type]
    text = str(caught.value)
    assert all(word in text for word in ("'sgd', 'adam' or 'adamw'", "'epoch' or 'step'", "recipe.final_lr is 0.1"))
