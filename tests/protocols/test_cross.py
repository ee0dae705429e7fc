"""One source, many targets: what is trained, tested, kept and averaged."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.cli.parse import read_command_line, source_of
from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError, DataError
from vlprompt.protocols import cross
from vlprompt.protocols.cross import cross_dataset, cross_tables
from vlprompt.runs.run import Run, evaluate_head, run

Tiny = Callable[..., RunConfig]
TARGETS = ["toy-plain", "demo-kinds"]


@pytest.fixture
def source(tiny: Tiny, toy_sets: Path) -> Tiny:
    """``source("coop", ...)``: a run of seconds on the toy data set that has domains."""
    return lambda *method, **values: tiny(*method, **values).with_data(name="toy-styles", root=str(toy_sets))


@pytest.fixture
def tests_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that are tested, as they are."""
    made: list[str] = []
    usual = cross._test

    def noted(config: Any, head: Any, task: Any, folder: Path) -> Any:
        made.append(task.name)
        return usual(config, head, task, folder)

    monkeypatch.setattr(cross, "_test", noted)
    return made


def test_one_source_per_seed_is_tested_on_every_target(source: Tiny, tests_made: list[str], tmp_path: Path) -> None:
    config = source("coop", lr=0.2, classes="base", template="a drawing of a {}.")
    runs: list[Run] = []
    results, table = cross_dataset([config], TARGETS, (1, 2), with_source=True, report=runs.append)
    assert [(r.results["data"]["name"], r.results["data"]["classes"]) for r in runs] == [("toy-styles", "all")] * 2
    assert tests_made == TARGETS * 2
    (file,) = (tmp_path / "runs").glob("cross_dataset-*.json")
    assert json.loads(file.read_text()) == results
    assert (results["schema"], results["protocol"], results["seeds"]) == (1, "cross-dataset", [1, 2])
    (cell,) = results["cells"]
    assert (cell["method"], cell["data"], cell["shots"], cell["targets"]) == ("coop", "toy-styles", 2, TARGETS)
    for done, kept in zip(runs, cell["runs"], strict=True):
        assert kept["seed"] == done.results["data"]["seed"]
        assert kept["source"] == {part: done.results[part]["all"] for part in ("results", "zeroshot")}
        for target in TARGETS:  # the target's own names and template, whatever the source's are
            data = replace(config.data, name=target, classes="all", template=None)
            alone = evaluate_head(done.head_dir, data)
            score = kept["targets"][target]["results"]
            assert score == pytest.approx({name: alone[name] for name in score}) and {"top5", "ece"} <= score.keys()
            (counted,) = (done.folder / "targets").glob(f"{target}-*-per_class.csv")
            rows = [row for row in csv.DictReader(counted.read_text().splitlines()) if row["scores"] == "results"]
            assert sum(int(row["correct"]) for row in rows) == score["correct"]
    for label, part in (("coop", "results"), ("zero-shot", "zeroshot")):
        row = cell["rows"][label]
        each = [
            [100 * one["targets"][t][part]["correct"] / one["targets"][t][part]["total"] for t in TARGETS]
            for one in cell["runs"]
        ]
        for index, target in enumerate(TARGETS):
            values = [own[index] for own in each]
            expected = {"mean": statistics.mean(values), "deviation": statistics.pstdev(values)}
            assert row["targets"][target] == pytest.approx(expected)
        means = [statistics.mean(own) for own in each]
        assert row["mean_of_targets"]["mean"] == pytest.approx(statistics.mean(means))  # the source is not in it
        assert row["mean_of_targets"]["deviation"] == pytest.approx(statistics.pstdev(means))
        firsts = [one["source"][part]["accuracy"] for one in cell["runs"]]
        whole = [statistics.mean([first, *own]) for first, own in zip(firsts, each, strict=True)]
        assert row["mean_with_source"]["mean"] == pytest.approx(statistics.mean(whole))
    assert "toy-styles (source)" in table and "mean of 2 targets" in table and "mean with the source" in table
    assert "trained on toy-styles with 2 shots" in table

    again: list[Run] = []
    tests_made.clear()
    assert cross_dataset([config], TARGETS, (1, 2), with_source=True, report=again.append) == (results, table)
    assert all(r.reused for r in again) and not tests_made


def test_targets_are_kept_apart_and_tested_anew_where_that_is_due(source: Tiny, tests_made: list[str]) -> None:
    config = source("coop")
    runs: list[Run] = []
    first, _ = cross_dataset([config], ["toy-plain"], (1,), report=runs.append)
    cross_dataset([config], TARGETS, (1,))
    assert tests_made == ["toy-plain", "demo-kinds"]
    (kept,) = (runs[0].folder / "targets").glob("toy-plain-*.json")
    whole = kept.read_text()
    for damage in ("", "[]", whole[: len(whole) // 2], json.dumps({"key": json.loads(whole)["key"]})):
        kept.write_text(damage)
        tests_made.clear()
        assert cross_dataset([config], ["toy-plain"], (1,))[0] == first
        assert tests_made == ["toy-plain"] and kept.read_text() == whole
    tests_made.clear()
    assert cross_dataset([config], ["toy-plain"], (1,), force=True)[0]["cells"][0]["rows"] == first["cells"][0]["rows"]
    assert tests_made == ["toy-plain"]
    assert not [path.name for path in (runs[0].folder / "targets").iterdir() if path.name.startswith(".")]


def test_an_open_template_is_the_targets_own(source: Tiny, toy_sets: Path) -> None:
    results, _ = cross_dataset([source("zeroshot")], ["demo-kinds"], (1,))
    (one,) = results["cells"][0]["runs"]
    assert one["targets"]["demo-kinds"]["results"] == one["targets"]["demo-kinds"]["zeroshot"]
    said = source("zeroshot", {"templates": ["{}"]})
    (other,) = cross_dataset([said], ["demo-kinds"], (1,))[0]["cells"][0]["runs"]
    assert other["targets"]["demo-kinds"]["zeroshot"] == other["targets"]["demo-kinds"]["results"]
    assert other["targets"]["demo-kinds"]["results"] != one["targets"]["demo-kinds"]["results"]


def test_a_method_without_a_source_runs_on_every_target(source: Tiny, tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.mkdir()
    data = source("zeroshot").data
    (book / "base.yaml").write_text(
        f"""\
method: tda
backbone: {{name: demo, pretrained: null}}
data: {{name: toy-styles, root: {data.root}, transform: center, shots: 1}}
trainer: {{accelerator: cpu, progress: false}}
output: {tmp_path / "runs"}
datasets:
  toy-plain: {{settings: {{positive_alpha: 9.0}}, data: {{template: "a drawing of a {{}}."}}}}
"""
    )
    config = source_of(read_command_line(["--config", str(book)]))
    runs: list[Run] = []
    results, table = cross_dataset([config], TARGETS, (1, 2), report=runs.append)
    assert [(run.results["data"]["name"], run.results["data"]["seed"]) for run in runs] == [
        *(("toy-styles", 1), ("toy-styles", 2)),
        *((target, seed) for seed in (1, 2) for target in TARGETS),
    ]
    own = {run.results["data"]["name"]: run.results for run in runs}
    assert [own[target]["config"]["settings"]["positive_alpha"] for target in TARGETS] == [9.0, 2.0]
    assert own["toy-plain"]["data"]["template"] == "a drawing of a {}." != own["demo-kinds"]["data"]["template"]
    (cell,) = results["cells"]
    for kept in cell["runs"]:
        for target in TARGETS:
            (run,) = [
                r for r in runs if (r.results["data"]["name"], r.results["data"]["seed"]) == (target, kept["seed"])
            ]
            assert kept["targets"][target]["results"] == run.results["results"]["all"]
            assert kept["targets"][target]["zeroshot"] == run.results["zeroshot"]["all"]
    again: list[Run] = []
    assert cross_dataset([config], TARGETS, (1, 2), report=again.append) == (results, table)
    assert len(again) == 6 and all(run.reused for run in again)


def test_a_start_reaches_the_targets_through_the_source(source: Tiny, tiny: Tiny) -> None:
    """TPT on CoOp: the context of every target is the one that was trained."""
    coop = run(tiny("coop", epochs=1, lr=0.2))
    runs: list[Run] = []
    config = source("tpt", {"crops": 3, "context_init": "an emoji of a"}, init_from=str(coop.folder))
    cross_dataset([config], ["toy-plain"], (1,), report=runs.append)
    first, target = runs
    assert first.results["config"]["init_from"] == str(coop.folder)
    assert target.results["config"]["init_from"] == str(first.folder)
    context = coop.head().method.trained_state()["prompt.ctx"]
    assert torch.equal(target.head().method.trained_state()["ctx"], context)


def test_everything_missing_is_told_before_anything_is_trained(source: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)2 of 4 data sets cannot be used \(dtd, food101\).*looked for"):
        cross_dataset([source("coop")], ["dtd", "toy-plain", "food101"], (1,))
    assert not (tmp_path / "runs").exists()


def test_learnables_of_the_sources_classes_are_refused_before_training(source: Tiny, tmp_path: Path) -> None:
    config = source("coop", {"context_init": "", "class_specific": True, "context_length": 2})
    with pytest.raises(ConfigError, match="coop cannot be moved to other data sets: .*class_specific"):
        cross_dataset([config], ["demo-kinds"], (1,))
    assert not (tmp_path / "runs").exists()


def test_methods_fitted_on_the_sources_images_are_refused_before_training(source: Tiny, tmp_path: Path) -> None:
    message = "tip_adapter cannot be moved .*classes of toy-styles and cannot classify those of demo-kinds"
    with pytest.raises(ConfigError, match=message):
        cross_dataset([source("tip_adapter", {"views": 0})], TARGETS, (1,))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets: none is named"),
        (["toy-stiles"], "'toy-stiles' is no data set. Did you mean 'toy-styles'"),
        (["demo-kinds", "demo-kinds"], "targets: 'demo-kinds' is named twice"),
        (["toy-styles"], "targets: 'toy-styles' is the source of coop"),
    ],
)
def test_targets_that_cannot_be_tested(targets: list[str], message: str, source: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        cross_dataset([source("coop")], targets, (1,))
    assert not (tmp_path / "runs").exists()


def test_each_source_has_its_table_and_an_oracle_its_mark() -> None:
    part = {"mean": 70.0, "deviation": 1.0}
    row = {"source": part, "targets": {"p": part, "q": part}, "mean_of_targets": part}
    cells = [
        {"method": method, "data": data, "shots": -1, "targets": ["p", "q"], "metrics": {"p": "accuracy", "q": "map"},
         "rows": {method: row, "zero-shot": row}, **({"oracle": True} if method == "mocoop" else {})}
        for data in ("one", "two") for method in ("coop", "mocoop")
    ]  # fmt: skip
    first, second = cross_tables(cells, "mine", [1, 2]).split("\n\n")
    assert first.startswith("mine: accuracy in %, trained on one with all images") and "trained on two" in second
    assert "mocoop (oracle)" in first and "q (mAP)" in first and first.count("70.00 ± 1.00") == 4 * 3
