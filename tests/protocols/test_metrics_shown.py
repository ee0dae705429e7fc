"""Metrics that a user asks for: a table each, in runs and in every protocol, from the scores of the same runs."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.main import main
from vlprompt.config.run import RunConfig
from vlprompt.engine.metrics import METRICS, OF_ONE_LABEL, measured
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.domains import domain_generalisation
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.search import search
from vlprompt.runs.folder import RESULTS
from vlprompt.runs.run import Run, run
from vlprompt.runs.tables import harmonic_mean

Tiny = Callable[..., RunConfig]
SHOWN = ("ece", "mean_per_class", "f1")
SEEDS = (1, 2)


@pytest.fixture
def config(tiny: Tiny, toy_sets: Path) -> RunConfig:
    return tiny("coop", lr=0.2).with_data(name="toy-styles", root=str(toy_sets))


def mean(runs: list[Run], metric: str, pick: Callable[[dict[str, Any]], dict[str, Any]]) -> float:
    return statistics.mean(measured(pick(done.results["results"]), metric) for done in runs)


def check_tables(table: str, title: str, values: dict[str, float]) -> None:
    """Check that each metric has a table of that title, and that it shows the mean of the metric."""
    tables = dict(zip(SHOWN, table.split("\n\n"), strict=True))
    for metric, text in tables.items():
        assert re.match(title.format(METRICS[metric]), text) and f"{values[metric]:.2f} ±" in text, text


def test_few_shot(config: RunConfig, tmp_path: Path) -> None:
    runs: list[Run] = []
    results, table = few_shot([config], (1,), SEEDS, metrics=SHOWN, report=runs.append)
    plain, _ = few_shot([config], (1,), SEEDS)
    assert {key: value for key, value in results.items() if key != "metrics"} == plain and "metrics" not in plain
    assert json.loads(next((tmp_path / "runs").glob("few_shot-*.json")).read_text()) in (results, plain)
    assert len(list((tmp_path / "runs").glob("few_shot-*.json"))) == 2
    values = {metric: mean(runs, metric, lambda scores: scores["all"]) for metric in SHOWN}
    assert len({*values.values(), mean(runs, "accuracy", lambda scores: scores["all"])}) >= 3
    check_tables(table, "few-shot {} in %", values)
    for metric in SHOWN:
        (cell,) = results["metrics"][metric]["cells"]
        assert cell["metric"] == metric and set(cell["rows"]["coop"]["1"]) == {"mean", "deviation"}
        assert cell["rows"]["coop"]["1"]["mean"] == pytest.approx(values[metric])


def test_base_to_new(config: RunConfig) -> None:
    runs: list[Run] = []
    results, table = base_to_new([config], SEEDS, metrics=SHOWN, report=runs.append)
    halves = {
        half: {metric: mean(runs, metric, lambda scores, half=half: scores[half]) for metric in SHOWN}
        for half in ("base", "new")
    }
    for values in halves.values():
        check_tables(table, "base-to-new {} in %", values)
    rows = {metric: results["metrics"][metric]["cells"][0]["rows"]["coop"] for metric in SHOWN}
    for metric in ("mean_per_class", "f1"):
        expected = harmonic_mean(halves["base"][metric], halves["new"][metric])
        assert rows[metric]["harmonic_mean"] == pytest.approx(expected)
    assert "harmonic_mean" not in rows["ece"]  # the smaller, the better


def test_cross_dataset(config: RunConfig) -> None:
    results, table = cross_dataset([config], ["toy-plain"], SEEDS, metrics=SHOWN)
    scores = [one["targets"]["toy-plain"]["results"] for one in results["cells"][0]["runs"]]
    check_tables(
        table, "cross-dataset: {} in %", {m: statistics.mean(measured(score, m) for score in scores) for m in SHOWN}
    )


def test_domains(config: RunConfig) -> None:
    results, table = domain_generalisation([config], "leave-one-out", SEEDS, metrics=SHOWN)
    runs = results["cells"][0]["runs"]
    scores = [one["results"]["c"] for one in runs if "c" in one["results"]]
    check_tables(
        table,
        "toy-styles, leave-one-out: {} in % by",
        {m: statistics.mean(measured(score, m) for score in scores) for m in SHOWN},
    )


def test_search(config: RunConfig) -> None:
    found = search(config, {"recipe.epochs": [1, 2]})
    candidates, *tables = found.table(SHOWN).split("\n\n")
    assert "by candidate" in candidates and "\n\n".join(tables) == found.run.table(SHOWN)


def test_a_run_has_a_table_of_each(config: RunConfig) -> None:
    done = run(config)
    scores = done.results["results"]["all"]
    assert set(scores) == {*OF_ONE_LABEL, "correct", "total"}
    tables = done.table(SHOWN).split("\n\n")
    for metric, text in zip(SHOWN, tables, strict=True):
        assert text.startswith(f"toy-styles: {METRICS[metric]} in %") and f" {scores[metric]:.2f} " in text
    assert done.table(["accuracy"]) == done.table()


def test_results_of_an_earlier_version_say_what_to_do(config: RunConfig) -> None:
    done = run(config)
    for score in (done.results["results"]["all"], done.results["zeroshot"]["all"]):
        del score["ece"]
    (done.folder / RESULTS).write_text(json.dumps(done.results))
    assert run(config).reused and "in %" in run(config).table()
    with pytest.raises(ConfigError, match="no 'ece'.*--force"):
        run(config).table(["ece"])
    assert "ece" in run(config, force=True).results["results"]["all"]


@pytest.mark.parametrize("dry", [True, False])
def test_metrics_of_other_labels_are_refused_before_anything_is_run(
    dry: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        "--config",
        "zeroshot",
        "--metrics",
        "map,top5",
        "--output",
        str(tmp_path),
        *(["--dry-run"] if dry else []),
    ]
    for command in (["train", "--data.name", "demo"], ["eval", "--protocol", "few-shot", "--datasets", "demo,voc2007"]):
        assert main([*command, *words]) == 2
        text = capsys.readouterr().err
        assert f"demo has one label per image and no map; accepted: {', '.join(OF_ONE_LABEL)}" in text
        assert ("voc2007 has several labels per image and no top5" in text) == (command[0] == "eval")
    assert main(["base-to-new", "--config", "zeroshot/demo", "--metrics", "top-5", "--dry-run"]) == 2
    assert "'top-5' is no metric. Did you mean 'top5'?" in capsys.readouterr().err


def test_commands_show_the_metrics(
    config: RunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(replace(config, method="zeroshot", settings={}))
    scores = done.results["results"]["all"]
    assert main(["eval", str(done.folder), "--metrics", "top5,ece"]) == 0
    expected = f"top-5 accuracy {scores['top5']:.2f} %, expected calibration error {scores['ece']:.2f} %"
    assert f"{expected} ({scores['total']} images)" in capsys.readouterr().out
    assert main(["train", "--config", str(done.folder / "config.yaml"), "--metrics", "top5,ece"]) == 0
    assert done.table(["top5", "ece"]) in capsys.readouterr().out
