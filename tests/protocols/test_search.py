"""Choosing hyperparameters: on validation images alone, tested once; an oracle's choice is marked wherever it goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RunConfig
from vlprompt.datasets import FewShotTask, images, load_dataset
from vlprompt.engine.fit import score
from vlprompt.errors import ConfigError, NotFiniteError
from vlprompt.protocols import search as searching
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.domains import domain_generalisation
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.search import candidates_of, search
from vlprompt.runs import session as sessions
from vlprompt.runs.run import evaluate_head, run, validate

Tiny = Callable[..., RunConfig]
GRID = {"recipe.lr": [1e-6, 0.2], "recipe.epochs": [2, 3]}


@pytest.fixture
def toy(tiny: Tiny, toy_sets: Path) -> Tiny:
    """``toy("coop", ...)``: a run of seconds on the toy data set with domains, which has validation images."""
    return lambda *method, **values: tiny(*method, **values).with_data(name="toy-styles", root=str(toy_sets))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The image files that are opened, as they are."""
    paths: list[str] = []
    usual = images.FileSource.open

    def noted(source: Any) -> Any:
        paths.append(str(source.path))
        return usual(source)

    monkeypatch.setattr(images.FileSource, "open", noted)
    return paths


def parts(paths: list[str]) -> set[str]:
    return {Path(path).parts[-3] for path in paths}


# -- on validation images -------------------------------------------------------------------------------------------
def test_the_best_on_validation_images_is_tested(toy: Tiny, tmp_path: Path) -> None:
    config = toy("coop")
    lines: list[str] = []
    found = search(config, GRID, report=lines.append)
    scores = found.selection["scores"]
    values = [one["values"] for one in scores]
    assert values == [{"recipe.lr": lr, "recipe.epochs": epochs} for lr in (1e-6, 0.2) for epochs in (2, 3)]
    task = load_dataset("toy-styles", root=config.data.root, shots=2)
    assert all(one["score"].items() >= score(one["score"]["correct"], len(task.val)).items() for one in scores)
    assert [len(lines), lines[0].split(":")[0]] == [4, "recipe.lr 1.0e-06, recipe.epochs 2"]
    best = max(one["score"]["correct"] for one in scores)
    first = next(one["values"] for one in scores if one["score"]["correct"] == best)
    assert found.selection["chosen"] == first and not found.selection["oracle"] and found.selection["on"] == "val"
    winner = found.run.results
    assert winner["selection"] == found.selection == json.loads((found.folder / "selection.json").read_text())
    assert json.loads((found.run.folder / "results.json").read_text()) == winner
    assert found.run.folder.is_relative_to(found.folder) and found.folder.parent == tmp_path / "runs"
    folders = [path.parent for path in found.folder.rglob("validation.json")]
    assert len(folders) == 4 and [folder for folder in folders if (folder / "results.json").exists()] == [
        found.run.folder
    ]
    alone = run(replace(config, recipe=replace(config.recipe, lr=first["recipe.lr"], epochs=first["recipe.epochs"])))
    assert alone.results["results"] == winner["results"] and "selection" not in alone.results
    assert "chosen" in found.table() and "on the validation images" in found.table() and "oracle" not in found.table()
    assert parse_run(["--config", str(found.folder / "best.yaml")]).output == str(found.folder)

    again = search(config, GRID)
    assert again.run.reused and again.selection == found.selection and again.table() == found.table()


def test_test_images_are_opened_for_the_winner_alone(
    toy: Tiny, opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))  # nothing is known yet
    config = toy("coop")
    validate(config)
    assert parts(opened) == {"train", "val"}
    validate(config)  # kept
    opened.clear()
    seen: list[set[str]] = []
    search(toy("coop", lr=0.3), {"recipe.lr": [0.1, 0.2]}, report=lambda _: seen.append(parts(opened)))
    assert all("test" not in own for own in seen) and len(seen) == 2
    assert "test" in parts(opened)  # the winner's


def test_of_equals_the_first_is_chosen(toy: Tiny) -> None:
    found = search(toy("coop"), {"recipe.test_batch_size": [7, 5, 9]})
    assert len({one["score"]["correct"] for one in found.selection["scores"]}) == 1
    assert found.selection["chosen"] == {"recipe.test_batch_size": 7}


def test_a_candidate_that_is_not_finite_has_failed(toy: Tiny) -> None:
    """It was ranked as 0 %, or ended the search."""
    lines: list[str] = []
    found = search(toy("coop", epochs=3, warmup_epochs=0), {"recipe.lr": [1e38, 0.1]}, report=lines.append)
    failed, scored = found.selection["scores"]
    assert failed["score"] is None and "not finite" in failed["failed"] and scored["score"] is not None
    assert found.selection["chosen"] == {"recipe.lr": 0.1}
    assert "failed" in lines[0] and "failed" in found.table()
    with pytest.raises(NotFiniteError, match="all 1 candidates failed"):
        search(toy("coop", epochs=3, warmup_epochs=0), {"recipe.lr": [1e38]})


def test_an_unfinished_search_goes_on(toy: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, grid = toy("coop", lr=0.1), {"recipe.epochs": [1, 2, 3]}
    whole = search(toy("coop", lr=0.1, output=config.output + "-whole"), grid)
    trained: list[int] = []
    usual = searching.validate

    def stopping(one: RunConfig, **more: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(one.recipe.epochs)
        return usual(one, **more)

    monkeypatch.setattr(searching, "validate", stopping)
    with pytest.raises(KeyboardInterrupt):
        search(config, grid)
    monkeypatch.setattr(searching, "validate", usual)
    found = search(config, grid)
    assert found.selection == whole.selection and found.run.results["results"] == whole.run.results["results"]


def test_templates_of_a_method_without_learnables(toy: Tiny) -> None:
    found = search(toy("zeroshot"), {"settings.templates": [["a {}."], ["an emoji of a {}.", "a {}."]]})
    assert len(found.selection["scores"]) == 2 and found.run.results["train"]["epochs"] == 0


# -- oracles --------------------------------------------------------------------------------------------------------
def test_a_search_on_test_images_is_refused_and_writes_nothing(toy: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chosen on validation images only.*Add --oracle"):
        search(toy("coop"), GRID, on="test")
    assert not (tmp_path / "runs").exists()


def test_an_oracle_is_marked_in_every_table_it_reaches(toy: Tiny, tmp_path: Path) -> None:
    found = search(toy("coop", lr=0.2), {"recipe.epochs": [1, 2]}, on="test", oracle=True)
    tested = [one["score"] for one in found.selection["scores"]]
    results = [json.loads(path.read_text()) for path in found.folder.rglob("results.json")]
    assert len(results) == 2 and all(one["selection"]["oracle"] for one in results)
    assert sorted(one["results"]["all"]["correct"] for one in results) == sorted(one["correct"] for one in tested)
    assert found.run.results["selection"] == found.selection and found.selection["oracle"]
    assert found.table().count("(oracle)") == 2 and "coop (oracle)" in found.run.table()
    assert "an oracle's choice: candidates are scored on the test images" in found.table()

    # Whatever goes on from the choice bears its mark: other seeds, other protocols, other data.
    best = parse_run(["--config", str(found.folder / "best.yaml")])
    plain = replace(best, output=str(tmp_path / "runs"), recipe=replace(best.recipe, lr=0.1))
    both = [best, plain]
    for results, table in (
        base_to_new(both, (2,), datasets=["toy-plain", "toy-styles"]),
        few_shot(both, (1,), (2,), datasets=["toy-plain", "toy-styles"]),
        cross_dataset(both, ["toy-plain"], (2,)),
        domain_generalisation(both, "leave-one-out", (2,)),
    ):
        cells = results["cells"] + results.get("average", [])
        assert {bool(cell.get("oracle")) for cell in cells} == {True, False}
        versions = 3 if results["protocol"] == "leave-one-out" else 1  # rows of a cell: clean, noise, blur
        rows = [line for line in table.splitlines() if "not to be confused" not in line]
        marked = sum(bool(cell.get("oracle")) for cell in cells)
        assert "\n".join(rows).count("(oracle)") == marked * versions and "zero-shot (oracle)" not in table
    assert (
        evaluate_head(found.run.head_dir, best.data)["oracle"]
        and not evaluate_head(run(plain).head_dir, best.data)["oracle"]
    )
    further = search(best, {"recipe.lr": [0.1]})
    assert further.selection["oracle"] and "goes on from an oracle's choice" in further.selection["reason"]


@pytest.fixture
def same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation images are test images, as on ImageNet."""

    def load(*args: Any, **values: Any) -> FewShotTask:
        task = load_dataset(*args, **values)
        return replace(task, val=task.test)

    monkeypatch.setattr(sessions, "load_dataset", load)


@pytest.mark.usefixtures("same_images")
def test_validation_images_that_are_test_images_make_an_oracle(tiny: Tiny) -> None:
    config = tiny("coop")
    with pytest.raises(ConfigError, match="13 of folder's 13 validation images are test images, too.*Add --oracle"):
        search(config, {"recipe.epochs": [1]})
    found = search(config, {"recipe.epochs": [1]}, oracle=True)
    assert found.selection["on"] == "val" and found.selection["oracle"] and "coop (oracle)" in found.table()


def test_no_validation_images(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder has no validation images to choose on.*--on test --oracle"):
        search(tiny("coop"), {"recipe.epochs": [1]})
    with pytest.raises(ConfigError, match="folder has no validation images to score on"):
        validate(tiny("coop"))
    assert not (tmp_path / "runs").exists()


# -- grids ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("grid", "messages"),
    [
        ({}, ["the grid is empty; accepted: keys with values, such as recipe.lr=0.002,0.02"]),
        ({"recipe.lr": []}, ["recipe.lr has no values to try"]),
        ({"recipe.lr": [0.1, 0.1]}, ["recipe.lr has a value twice"]),
        ({"recipe.lrr": [1]}, ["'recipe.lrr' cannot be searched. Did you mean 'recipe.lr'"]),
        ({"settings.top_k": [1]}, ["'settings.top_k' cannot be searched"]),
        ({"seed": [1, 2], "data.shots": [1]}, ["'seed' cannot be searched. It says which task", "'data.shots' cannot"]),
        ({"recipe.lr": ["fast"], "recipe.epochs": [1.5]}, ["recipe.lr is 'fast'", "recipe.epochs is 1.5; accepted: a"]),
        ({"recipe.lr": [-1.0]}, ["recipe.lr is -1.0; accepted: a finite number above 0"]),
        ({"recipe.final_lr": [1.0]}, ["recipe.final_lr is 1.0; accepted: 0 to recipe.lr (0.002) (of the candidate"]),
        ({"settings.context_length": [0]}, ["settings.context_length is 0; accepted: a whole number from 1 to 74"]),
        (
            {"data.transform": ["centre"]},
            ["data.transform is 'centre'; accepted: 'random', 'random-tensor', 'random-half', 'center', 'pad' or"],
        ),
        ({"recipe.epochs": list(range(1, 1002))}, ["the grid has 1,001 candidates; accepted: at most 1,000"]),
    ],
)  # fmt: skip
def test_grids_that_cannot_be_searched(grid: dict[str, Any], messages: list[str], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the grid cannot be searched") as caught:
        search(tiny("coop"), grid)
    assert all(message in str(caught.value) for message in messages), caught.value
    assert not (tmp_path / "runs").exists()


def test_candidates_are_in_grid_order_and_leave_the_rest_alone(tiny: Tiny) -> None:
    config = tiny("coop", {"context_init": ""})
    found = candidates_of(config, {"settings.context_length": [2, 4], "data.transform": ["center", "random"]})
    assert [(one.settings["context_length"], one.data.transform) for _, one in found] == [
        *((2, "center"), (2, "random"), (4, "center"), (4, "random"))
    ]
    assert all(one.recipe == config.recipe and one.seed == config.seed for _, one in found)


def test_grids_without_effect_are_refused(tiny: Tiny) -> None:
    wrong = {
        "settings.context_length has no effect: settings.context_init is 'an emoji of a', whose": (
            tiny("coop"),
            [4, 8],
        ),
        "recipe.lr has no effect: tip_adapter takes no gradient steps": (tiny("tip_adapter"), [0.1, 0.2]),
        "settings.alpha has no effect": (tiny("tip_adapter", {"search": True}), [1.0, 2.0]),
        "data.template has no effect": (tiny("zeroshot", {"templates": ["a {}."]}), ["one {}.", "the {}."]),
    }
    for text, (config, values) in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(text)):
            candidates_of(config, {text.split()[0]: values})
    grid = {"settings.context_init": ["", "one two"], "settings.context_length": [2, 3]}
    with pytest.raises(ConfigError, match="are the same run: one value switches another one off"):
        candidates_of(tiny("coop"), grid)


def test_settings_of_the_decomposition_can_be_searched(tiny: Tiny) -> None:
    key = "decomposition.dept_lowrank.lr_ratio"
    config = replace(tiny("coop"), decomposition={"dept_lowrank": {"rank": 3}})
    found = [one for _, one in candidates_of(config, {key: [0.01, 0.1, 1.0]})]
    assert [one.decomposition for one in found] == [
        {"dept_lowrank": {"rank": 3, "lr_ratio": ratio}} for ratio in (0.01, 0.1, 1.0)
    ]
    assert config.decomposition == {"dept_lowrank": {"rank": 3}}
    own = candidates_of(tiny("dept_lowrank"), {"settings.dept_lowrank.lr_ratio": [0.01]})[0][1]
    assert own.settings["dept_lowrank"]["lr_ratio"] == 0.01
    for wrong, grid in (("cannot be searched", {"decomposition.ept.rank": [3]}), ("-1.0; accepted: a", {key: [-1.0]})):
        with pytest.raises(ConfigError, match=wrong):
            candidates_of(config, grid)
    with pytest.raises(ConfigError, match="cannot be searched"):
        candidates_of(tiny("coop"), {key: [0.1]})
