"""The commands of several runs: what ``eval --protocol``, ``search`` and ``compare`` call and print, and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.fixtures.stubs import Calls, stub
from vlprompt.cli.main import main
from vlprompt.cli.parse import parse_run
from vlprompt.config.keys import to_yaml
from vlprompt.protocols import compare as comparing
from vlprompt.protocols.protocol_files import protocol_folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Stands in for what the commands call: notes name and arguments, returns small results."""
    noted: Calls = []
    found = SimpleNamespace(
        folder=Path("runs/search-1"), run=SimpleNamespace(folder=Path("runs/toy")), table=lambda metrics: "T"
    )
    stub(monkeypatch, "vlprompt.protocols.protocols", "run_plan", ({}, "the table"), noted)
    stub(monkeypatch, "vlprompt.protocols.search", "search", found, noted)
    monkeypatch.chdir(tmp_path)
    return noted


# -- eval --protocol ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [["--protocol", "few-shot"], ["--protocol=Few_Shot"]])
def test_a_protocol_takes_configurations_and_overrides(
    words: Sequence[str], calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--config", "coop/demo", "--config", "mocoop/demo", "--seeds", "4, 5", "--recipe.epochs", "2"]
    more += ["--datasets", "demo,Food-101", "--shots", "1,-1", "--force"]
    assert main(["eval", *words, *more]) == 0
    ((name, (plan, options)),) = calls
    assert name == "run_plan" and (plan.name, plan.part) == ("few-shot", "same") and options["force"] is True
    assert plan.seeds == (4, 5) and plan.datasets == ("demo", "food101")
    assert [(one.method, one.recipe.epochs, one.data.name, one.data.shots) for one in plan.configs] == [
        (method, 2, name, shots) for method in ("coop", "mocoop") for name in ("demo", "food101") for shots in (1, -1)
    ]
    assert capsys.readouterr().out == "the table\n"
    options["report"](SimpleNamespace(folder="runs/one", selected=None))
    assert capsys.readouterr().out == "run folder: runs/one\n"


def test_a_protocol_without_overrides_is_as_described(calls: Calls) -> None:
    assert main(["eval", "--protocol", "cross-dataset", "--config", "coop/demo"]) == 0
    plan, options = calls[0][1]
    assert plan.seeds == (1, 2, 3) and len(plan.trainings[0].targets) == 10 and options["force"] is False
    assert main(["eval", "--protocol", "cross-dataset", "--config", "coop/demo", "--targets", "demo-2,demo-3"]) == 0
    assert [one.config.data.name for one in calls[1][1][0].trainings[0].targets] == ["demo-2", "demo-3"]
    assert main(["eval", "--protocol", "leave-one-out", "--config", "coop/demo-styles", "--data.shots", "3"]) == 0
    assert {config.data.shots for config in calls[2][1][0].configs} == {3}  # not the protocol's


def test_a_protocol_of_ones_own(calls: Calls, tmp_path: Path) -> None:
    text = (protocol_folder() / "few-shot.yaml").read_text().replace("name: few-shot", "name: mine")
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["eval", "--protocol", "mine.yaml", "--config", "coop/demo"]) == 0
    assert calls[0][1][0].name == "mine"


def test_print_config_of_a_protocol(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--protocol", "few-shot", "--config", "coop/demo", "--datasets", "demo,demo-2", "--shots", "1,2"]
    assert main([*words, "--print-config"]) == 0 and not calls
    printed = [yaml.safe_load(text)["data"] for text in capsys.readouterr().out.split("---\n")]
    assert [(one["name"], one["shots"], one["classes"]) for one in printed] == [
        (name, shots, "all") for name in ("demo", "demo-2") for shots in (1, 2)
    ]


def test_list_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "protocols", "*domains*"]) == 0 and capsys.readouterr().out == "imagenet-domains\n"


PROTOCOL = "eval --config coop/demo --protocol "
BAD_COMMANDS = {
    "an unknown protocol": (PROTOCOL + "few-shto", ["--protocol is 'few-shto'; accepted:", "Did you mean 'few-shot'"]),
    "no protocol": ("eval --config coop/demo --protocol", ["--protocol has no value"]),
    "no configuration": ("eval --protocol few-shot", ["no --config FILE"]),
    "shots that are none": (PROTOCOL + "few-shot --shots 0", ["--shots is '0'; accepted: different numbers of images"]),
    "shots twice": (PROTOCOL + "few-shot --shots 2,2", ["--shots is '2,2', which names a shot twice"]),
    "seeds that are words": (PROTOCOL + "few-shot --seeds one", ["--seeds is 'one'"]),
    "an unknown target": (PROTOCOL + "cross-dataset --targets dmo", ["--targets: 'dmo' is no data set. Did you mean"]),
    "an unknown group": (PROTOCOL + "few-shot --datasets group:x", ["no data set's card names the group 'x'"]),
    "shots of the configuration": (PROTOCOL + "few-shot --data.shots 2", ["--data.shots has no meaning", "--shots"]),
    "data of the configuration": (PROTOCOL + "few-shot --data.name demo", ["--data.name has no meaning", "--datasets"]),
    "what the protocol sets": (
        PROTOCOL + "single-source --data.source [a] --seed 1 --data.classes base",
        ["--data.source has no meaning", "--seed has no meaning", "--data.classes has no meaning"],
    ),
    "a run and a protocol": (PROTOCOL + "few-shot runs/one", ["'runs/one' has no key"]),
    "search without a grid": ("search --config coop/demo", ["no --grid KEY=VALUE,VALUE"]),
    "a grid without values": ("search --config coop/demo --grid recipe.lr", ["--grid is 'recipe.lr'; accepted: KEY="]),
    "a grid that is not there": ("search --config coop/demo --grid", ["--grid is ''; accepted: KEY=VALUE,VALUE"]),
    "a grid twice": ("search --config coop/demo --grid a=1 --grid a=2", ["--grid a is given twice"]),
    "a grid with braces": ("search --config coop/demo --grid data.template=a{}.,b", ["not valid YAML", "in quotes"]),
    "a grid and its key": ("search --config coop/demo --grid recipe.lr=1,2 --recipe.lr 3", ["--recipe.lr is given"]),
    "search without anything": ("search", ["no --config FILE", "no --grid"]),
    "compare one": ("compare a", ["compare takes two runs, got 1"]),
    "compare with a key": ("compare a b --seed 1", ["'--seed' is not an option of `vlprompt compare`"]),
    "compare nothing": ("compare a b", ["'a' holds no results.json; give the folder of a finished run"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_malformed_command_names_the_culprit(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    command, culprits = BAD_COMMANDS[case]
    err = fails(*command.split())
    assert all(culprit in err for culprit in culprits), err
    assert not list(tmp_path.iterdir())


# -- search ---------------------------------------------------------------------------------------------------------
def test_search_takes_grids_of_every_kind(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--grid", "recipe.lr=2e-3,0.02", "--grid=settings.context_init='a, b',an emoji of a", "--seed", "3"]
    words += ["--grid", "settings.class_specific=true,false", "--on", "test", "--oracle", "--force"]
    assert main(["search", "--config", "coop/demo", *words]) == 0
    ((_, (config, grid, on, oracle, options)),) = calls
    assert config == parse_run(["--config", "coop/demo", "--seed", "3"])
    assert grid == {
        "recipe.lr": [0.002, 0.02],
        "settings.context_init": ["a, b", "an emoji of a"],
        "settings.class_specific": [True, False],
    }
    assert list(grid) == ["recipe.lr", "settings.context_init", "settings.class_specific"]
    assert (on, oracle, options["force"]) == ("test", True, True)
    assert capsys.readouterr().out == "T\nbest:       runs/search-1/best.yaml\nrun folder: runs/toy\n"


def test_search_is_on_validation_images_unless_told(calls: Calls) -> None:
    assert main(["search", "--config", "coop/demo", "--grid", "recipe.lr=1,2"]) == 0
    assert calls[0][1][2:4] == ("val", False)


def test_print_config_of_a_search(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--config", "coop/demo", "--grid", "recipe.epochs=1,2", "--print-config"]
    assert main(words) == 0 and not calls
    assert [yaml.safe_load(text)["recipe"]["epochs"] for text in capsys.readouterr().out.split("---\n")] == [1, 2]


# -- compare and eval -----------------------------------------------------------------------------------------------
def test_compare_says_by_its_status_whether_the_data_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def results(seed: int, method: str) -> str:
        data = {key.removeprefix("data."): "x" for key in comparing._PROTOCOL if key.count(".") == 1}
        data |= {"seed": seed, "shots": 1, "transform": {"train": "t", "test": "t"}}  # type: ignore[dict-item]
        backbone = dict.fromkeys(("name", "pretrained", "precision", "fingerprint"), "x")
        config = {"settings": {}, "recipe": {}}
        scores = {"all": {"accuracy": 50.0, "correct": 1, "total": 2}}
        runs = {"results": scores, "zeroshot": scores, "train": {}}
        return json.dumps({"data": data, "backbone": backbone, "config": config, "method": method, **runs})

    monkeypatch.chdir(tmp_path)
    for name, text in (("a", results(1, "coop")), ("b", results(1, "mocoop")), ("c", results(2, "coop"))):
        Path(name).mkdir()
        Path(name, "results.json").write_text(text)
    assert main(["compare", "a", "b/results.json"]) == 0
    out = capsys.readouterr().out
    assert out == "the data protocol is the same\nalso different:\n  - method: 'coop' against 'mocoop'\n"
    assert main(["compare", "a", "c"]) == 1
    assert capsys.readouterr().out == "the data protocol differs:\n  - seed: 1 against 2\n"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"accuracy": 87.5, "correct": 7, "total": 8}, "87.50 % (7/8 images)"),
        (
            {"accuracy": 87.5, "correct": 7, "total": 8, "oracle": True},
            "87.50 % (7/8 images) (oracle: its hyperparameters were chosen on test images)",
        ),
        (
            {"metric": "mean_per_class", "mean_per_class": 80.0, "accuracy": 87.5, "correct": 7, "total": 8},
            "mean per-class accuracy 80.00 % (accuracy 87.50; 8 images)",
        ),
        (
            {"metric": "map", "map": 60.0, "map_11point": 61.0, "cf1": 50.0, "of1": 55.0, "total": 8},
            "mAP 60.00 % (11-point mAP 61.00, CF1 50.00, OF1 55.00; 8 images)",
        ),
    ],
)
def test_eval_says_the_headline_and_what_else_was_measured(
    scores: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stub(monkeypatch, "vlprompt.runs.run", "evaluate_head", scores)
    (tmp_path / "run" / "head").mkdir(parents=True)
    (tmp_path / "run" / "head" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(parse_run(["--config", "coop/demo"])))
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"demo, base classes: {words}\n"
