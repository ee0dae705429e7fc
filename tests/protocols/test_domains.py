"""Domain generalisation: scores by domain in every run, and two protocols with one table per data set and one file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlprompt
from vlprompt.config.run import DataConfig, RunConfig
from vlprompt.datasets import load_dataset
from vlprompt.engine.fit import score
from vlprompt.errors import ConfigError
from vlprompt.protocols.domains import domain_generalisation, domains_tables
from vlprompt.runs.run import Run, evaluate_head, run

Tiny = Callable[..., RunConfig]
TESTS = {"c": 8, "c+noise": 8, "a": 12, "a+blur": 12, "a+noise": 12, "b": 4, "b+noise": 4}  # all 4 classes


@pytest.fixture
def styles(tiny: Tiny, toy_sets: Path) -> Tiny:
    """``styles("coop", ...)``: a run of seconds on the toy data set that has domains."""
    return lambda *method, **values: tiny(*method, **values).with_data(name="toy-styles", root=str(toy_sets))


def accuracy(runs: list[Run], domain: str, part: str = "results") -> float:
    """Mean accuracy on a domain over those runs that tested it, from the counts."""
    scores = [one.results[part]["domains"][domain] for one in runs if domain in one.results[part]["domains"]]
    return statistics.mean(100 * one["correct"] / one["total"] for one in scores)


def of_seed(runs: list[Run], seed: int) -> list[Run]:
    return [one for one in runs if one.results["config"]["seed"] == seed]


# -- one run --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_norms", [False, True], ids=["cached features", "images"])
def test_scores_by_domain_are_those_of_the_domains_tested_alone(
    layer_norms: bool, styles: Tiny, tmp_path: Path
) -> None:
    config = styles("mocoop", {"tune_layer_norms": layer_norms}, lr=0.2, source=["a", "b"], target=["c", "a+blur"])
    done = run(config)
    assert (done.results["data"]["source"], done.results["data"]["target"]) == (["a", "b"], ["c", "a+blur"])
    assert (done.results["data"]["train"], done.results["data"]["test"]) == (8, 20)
    for part in ("results", "zeroshot"):
        scores = done.results[part]
        assert list(scores) == ["all", "domains"] and list(scores["domains"]) == ["c", "a+blur"]
        assert {name: one["total"] for name, one in scores["domains"].items()} == {"c": 8, "a+blur": 12}
        for one in (scores["all"], *scores["domains"].values()):
            assert {name: one[name] for name in ("accuracy", "correct", "total")} == score(one["correct"], one["total"])
        assert scores["all"]["correct"] == sum(one["correct"] for one in scores["domains"].values())
        assert scores["all"]["total"] == 20
    for name, one in (("c", done.results["results"]["domains"]["c"]), ("all", done.results["results"]["all"])):
        target = ["c"] if name == "c" else config.data.target
        found = evaluate_head(done.head_dir, config.with_data(target=target).data)
        assert {key: found[key] for key in one} == pytest.approx(one)  # the pooled calibration error, too
    assert "mocoop" in done.table() and f"{done.results['results']['all']['correct']}/20" in done.table()


def test_domains_after_base_classes_are_those_of_base_classes(styles: Tiny) -> None:
    scores = run(styles("coop", classes="base")).results["results"]
    assert {name: one["total"] for name, one in scores["domains"].items()} == {
        n: count // 2 for n, count in TESTS.items()
    }
    assert scores["base"]["total"] == scores["new"]["total"] == sum(TESTS.values()) // 2


def test_data_without_domains_have_no_scores_by_domain(styles: Tiny) -> None:
    done = run(styles("zeroshot").with_data(name="toy-plain"))
    assert list(done.results["results"]) == ["all"] and "source" not in done.results["data"]


def test_train_from_python_is_the_same_run(styles: Tiny, toy_sets: Path, tmp_path: Path) -> None:
    config = styles("coop", source=["a"], target=["b"])
    first = run(config)
    task = load_dataset("toy-styles", root=toy_sets, shots=2, source=["a"], target=["b"])
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), task.class_names, **config.settings)
    done = vlprompt.train(
        method, task, output=str(tmp_path / "other"), transform="center", trainer=config.trainer, epochs=2, batch_size=4
    )
    assert done.results["config"]["data"]["source"] == ["a"] and done.results["config"]["data"]["target"] == ["b"]
    assert done.results["results"] == first.results["results"]


# -- protocols ------------------------------------------------------------------------------------------------------
def test_leave_one_out(styles: Tiny, tmp_path: Path) -> None:
    config = styles("coop", lr=0.2, classes="base", source=["a"], target=["a"])  # overwritten by the protocol
    runs: list[Run] = []
    results, table = domain_generalisation([config], "leave-one-out", (1, 2), report=runs.append)
    seen = [(r.results["data"]["source"], r.results["data"]["target"], r.results["data"]["seed"]) for r in runs]
    assert seen == [
        (source, target, seed)
        for source, target in (
            (["a", "b"], ["c", "c+noise"]),
            (["c", "b"], ["a", "a+blur", "a+noise"]),
            (["c", "a"], ["b", "b+noise"]),
        )
        for seed in (1, 2)
    ]
    assert {r.results["data"]["classes"] for r in runs} == {"all"}
    (file,) = (tmp_path / "runs").glob("domains-leave-one-out-*.json")
    assert json.loads(file.read_text()) == results
    assert (results["schema"], results["protocol"], results["seeds"]) == (1, "leave-one-out", [1, 2])
    (cell,) = results["cells"]
    assert (cell["method"], cell["data"], cell["shots"]) == ("coop", "toy-styles", 2)
    assert (cell["targets"], cell["versions"]) == (["c", "a", "b"], ["clean", "noise", "blur"])
    for label, part in (("coop", "results"), ("zero-shot", "zeroshot")):
        for version, ending in (("clean", ""), ("noise", "+noise")):
            row = cell["rows"][label][version]
            per_seed = [[accuracy(of_seed(runs, seed), t + ending, part) for t in "cab"] for seed in (1, 2)]
            for index, target in enumerate("cab"):
                values = [seed[index] for seed in per_seed]
                expected = {"mean": statistics.mean(values), "deviation": statistics.pstdev(values)}
                assert row["targets"][target] == pytest.approx(expected)
            means = [statistics.mean(seed) for seed in per_seed]
            assert row["mean"] == pytest.approx({"mean": statistics.mean(means), "deviation": statistics.pstdev(means)})
        blur = cell["rows"][label]["blur"]
        assert list(blur["targets"]) == ["a"] and "mean" not in blur  # no mean over other domains than the clean one's
    assert len({one["targets"][t]["mean"] for one in cell["rows"]["coop"].values() for t in one["targets"]}) > 3
    kept = [(one["source"], one["seed"], one["results"], one["zeroshot"]) for one in cell["runs"]]
    assert kept == [
        (
            r.results["data"]["source"],
            r.results["data"]["seed"],
            *(r.results[p]["domains"] for p in ("results", "zeroshot")),
        )
        for r in runs
    ]
    assert "toy-styles, leave-one-out" in table and table.count("±") == 4 + 4 + 1

    again: list[Run] = []
    assert domain_generalisation([config], "leave-one-out", (1, 2), report=again.append) == (results, table)
    assert all(one.reused for one in again)


def test_single_source_is_the_mean_over_sources(styles: Tiny, tmp_path: Path) -> None:
    configs = [styles("coop", lr=0.2), styles("zeroshot")]
    runs: list[Run] = []
    results, table = domain_generalisation(configs, "single-source", (1,), report=runs.append)
    own = [one for one in runs if one.results["method"] == "coop"]
    assert [one.results["data"]["source"] for one in own] == [["c"], ["a"], ["b"]] and len(runs) == 6
    for cell, mine in zip(results["cells"], (own, runs[3:]), strict=True):
        row = cell["rows"][cell["method"]]["clean"]
        for target in "cab":
            scores = [r.results["results"]["domains"].get(target) for r in mine]
            assert [one is None for one in scores] == [r.results["data"]["source"] == [target] for r in mine]
            assert row["targets"][target]["mean"] == pytest.approx(accuracy(mine, target))
        assert row["mean"]["mean"] == pytest.approx(statistics.mean(accuracy(mine, target) for target in "cab"))
    assert results["cells"][1]["rows"]["zeroshot"] == results["cells"][0]["rows"]["zero-shot"]
    lines = [line for line in table.splitlines() if "│" in line]
    assert [[cell.strip() for cell in line.split("│")[1:3]] for line in lines] == [
        *(["zero-shot", version] for version in ("clean", "noise", "blur")),
        *(["coop", version] for version in ("clean", "noise", "blur")),
    ]
    assert "±" not in table and "mean over sources" in table
    assert len(list((tmp_path / "runs").glob("domains-single-source-*.json"))) == 1


def test_each_data_set_has_its_own_table_and_a_version_that_is_missing_a_dash() -> None:
    def row(value: float, *targets: str) -> dict[str, Any]:
        part = {"mean": value, "deviation": 0.5}
        return {"targets": dict.fromkeys(targets, part), "mean": part} if len(targets) == 2 else {
            "targets": dict.fromkeys(targets, part)
        }  # fmt: skip

    cells = [
        {
            "method": "coop",
            "data": data,
            "targets": ["p", "q"],
            "rows": {
                label: {"clean": row(value, "p", "q"), "noise": row(value - 1, "p")}
                for label, value in (("coop", 70.0), ("zero-shot", 60.0))
            },
        }
        for data in ("one", "two")
    ]
    first, second = domains_tables(cells, "leave-one-out", [1, 2]).split("\n\n")
    assert first.startswith("one, ") and second.startswith("two, ") and "seeds 1, 2" in " ".join(first.split())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in first.splitlines() if "│" in line]
    assert rows == [
        ["zero-shot", "clean", "60.00 ± 0.50", "60.00 ± 0.50", "60.00 ± 0.50"],
        ["zero-shot", "noise", "59.00 ± 0.50", "-", "-"],
        ["coop", "clean", "70.00 ± 0.50", "70.00 ± 0.50", "70.00 ± 0.50"],
        ["coop", "noise", "69.00 ± 0.50", "-", "-"],
    ]


def test_a_wide_table_keeps_whole_names_and_numbers() -> None:
    part = {"mean": 88.0, "deviation": 1.0}
    targets = [f"a-domain-with-a-long-name-{number}" for number in range(6)]
    row = {"clean": {"targets": dict.fromkeys(targets, part), "mean": part}}
    cell = {"method": "zeroshot", "data": "wide", "targets": targets, "rows": {"zero-shot": row}}
    title, *lines = domains_tables([cell], "single-source", [1, 2, 3]).splitlines()
    assert max(map(len, [title, *lines])) <= 120 and title.endswith("over seeds 1, 2, 3")
    assert sum(line.count("88.00 ± 1.00") for line in lines) == 7
    header = [line.split("┃")[1:-1] for line in lines if "┃" in line]
    assert ["".join(cells).replace(" ", "") for cells in zip(*header, strict=True)][2:-1] == targets


def test_nothing_is_run_where_something_cannot_be(styles: Tiny, tmp_path: Path) -> None:
    good, plain = styles("coop"), styles("coop").with_data(name="toy-plain")
    for configs, protocol, seeds, message in (
        ([], "leave-one-out", (1,), "leave-one-out needs at least one configuration and one seed"),
        ([good], "leave-one-out", (), "at least one configuration and one seed, such as --seeds 1,2,3"),
        ([good], "leave-one-out", (1, 1), r"a seed is given twice in \[1, 1\]"),
        ([good], "leave-out", (1,), "protocol is 'leave-out'; accepted: .* Did you mean 'leave-one-out'"),
        ([good, plain], "single-source", (1,), "toy-plain has no domains; single-source needs a data set"),
    ):
        with pytest.raises(ConfigError, match=message):
            domain_generalisation(configs, protocol, seeds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data.source names 'd', .* Accepted: c, a, b"):
        run(good.with_data(source=["d"]))
    assert not (tmp_path / "runs").exists()
    assert DataConfig().source == DataConfig().target == ()
