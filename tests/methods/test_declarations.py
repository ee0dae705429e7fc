"""What a method declares: settings of its objectives in one place, open templates, recipe, former names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlprompt import create_method, list_methods
from vlprompt.backbone import Backbone
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RecipeConfig
from vlprompt.errors import ConfigError
from vlprompt.methods import get_method_class
from vlprompt.objectives.base import objectives_in
from vlprompt.prompts.decomposed import decompositions_in

NAMES = ["cat", "annual crop land"]
DECLARED = [
    (name, section, part)
    for name in list_methods()
    for section, parts in (("objectives", objectives_in), ("decomposition", decompositions_in))
    for part in parts(get_method_class(name).Settings)
]
RENAMED = [
    (name, old, new)
    for name in list_methods()
    for old, new in getattr(get_method_class(name).Settings, "renamed", {}).items()
]


def number_of(settings: Any) -> str:
    return next(key for key, value in vars(settings).items() if isinstance(value, float))


@pytest.mark.parametrize(("name", "section", "part"), DECLARED)
def test_a_single_value_of_an_own_part_leaves_the_others(
    name: str, section: str, part: str, tiny_backbone: Backbone
) -> None:
    """``--objectives.X.y v`` and ``--settings.X.y v`` are the same, and every other setting keeps its value."""
    default = getattr(get_method_class(name).Settings(), part)
    key = number_of(default)
    expected = parse_run(["--method", name]).settings
    expected[part][key] = 0.5
    for words in ([f"--settings.{part}.{key}", "0.5"], [f"--{section}.{part}.{key}", "0.5"]):
        config = parse_run(["--method", name, *words])
        assert config.settings == expected and not config.objectives and not config.decomposition
    made = create_method(name, tiny_backbone, NAMES, **{section: {part: {key: 0.5}}})
    assert getattr(getattr(made.settings, part), key) == 0.5
    other = next((inner for inner, value in vars(default).items() if inner != key and value), None)
    assert other is None or getattr(getattr(made.settings, part), other) == getattr(default, other)


@pytest.mark.parametrize(("name", "section", "part"), DECLARED)
def test_a_value_given_in_both_places_is_refused(
    name: str, section: str, part: str, tiny_backbone: Backbone
) -> None:
    key = number_of(getattr(get_method_class(name).Settings(), part))
    words = [f"--settings.{part}.{key}", "0.5", f"--{section}.{part}.{key}", "0.25"]
    with pytest.raises(ConfigError, match=f"settings.{part}.{key}.*accepted: one"):
        parse_run(["--method", name, *words])
    with pytest.raises(ConfigError, match=f"settings.{part}.{key} is 0.5 and {section}.{part}.{key} 0.25"):
        create_method(name, tiny_backbone, NAMES, **{part: {key: 0.5}, section: {part: {key: 0.25}}})


def test_the_command_line_wins_over_a_file_under_the_other_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: kgcoop\nsettings: {knowledge: {weight: 3, templates: ['a {}.']}}\n")
    config = parse_run(["--config", str(path), "--objectives.knowledge.weight", "4"])
    assert config.settings["knowledge"] == {"weight": 4.0, "templates": ["a {}."], "variant": "code"}


def test_parts_can_be_left_out_by_null() -> None:
    assert parse_run(["--method", "restore", "--settings.surgery", "null"]).settings["surgery"] is None
    assert parse_run(["--method", "promptsrc", "--settings.aggregation", "null"]).settings["aggregation"] is None


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_former_names_are_refused_with_the_present_one(
    name: str, old: str, new: str, tiny_backbone: Backbone
) -> None:
    with pytest.raises(ConfigError) as caught:
        create_method(name, tiny_backbone, NAMES, **{old: 1})
    assert f"It is called settings.{new} now" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_run(["--method", name, f"--settings.{old}", "1"])
    assert f"It is called --settings.{new} now" in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [("dept", "dept_lowrank"), ("apt", "apt_approximated")])
def test_former_methods_are_refused_with_the_present_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"It is called '{new}' now"):
        get_method_class(old)


@pytest.mark.parametrize("objective", ["knowledge", "projected_gradient", "gradient_dropout"])
def test_an_open_template_of_an_objective_is_the_data_sets(objective: str, tiny_backbone: Backbone) -> None:
    made = create_method("coop", tiny_backbone, NAMES, objectives={objective: {}}, data_template="{} texture.")
    assert made.active[0].settings.templates == ("{} texture.",)
    given = {objective: {"templates": ["my {}."]}}
    made = create_method("coop", tiny_backbone, NAMES, objectives=given, data_template="{} texture.")
    assert made.active[0].settings.templates == ("my {}.",)


def test_open_templates_of_methods_and_of_their_objectives_are_the_data_sets(tiny_backbone: Backbone) -> None:
    for name in list_methods():
        settings = create_method(name, tiny_backbone, NAMES, data_template="{} texture.").settings
        for part in (settings, *(getattr(settings, one) for one in objectives_in(type(settings)))):
            if getattr(type(part)(), "templates", None) == ():
                assert part.templates == ("{} texture.",)


def test_the_recipe_is_the_methods() -> None:
    maple = get_method_class("maple").recipe
    assert (maple.epochs, maple.batch_size, maple.lr) == (5, 4, 0.0035)
    assert parse_run(["--method", "maple"]).recipe == maple
    assert parse_run(["--method", "maple", "--recipe.epochs", "7"]).recipe == RecipeConfig(
        epochs=7, batch_size=4, lr=0.0035
    )


def test_class_weights_is_deprecated(tiny_backbone: Backbone) -> None:
    method = create_method("zeroshot", tiny_backbone, NAMES)
    with pytest.warns(DeprecationWarning, match="text_features"):
        assert method.class_weights().equal(method.text_features())
