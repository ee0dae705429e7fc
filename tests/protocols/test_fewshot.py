"""The few-shot protocol: several shots, seeds and data sets; one table, one file; finished runs are reused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError, DataError
from vlprompt.protocols.fewshot import few_shot, few_shot_table
from vlprompt.runs.run import Run

Tiny = Callable[..., RunConfig]


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]


def test_two_data_sets_two_shots_two_seeds(tiny: Tiny, toy_sets: Path, tmp_path: Path) -> None:
    config = tiny("coop", lr=0.2, classes="base").with_data(name="folder", root=str(toy_sets))
    runs: list[Run] = []
    results, table = few_shot([config], (1, 2), (1, 2), datasets=["plainest", "toy-styles"], report=runs.append)
    seen = [(r.results["data"]["name"], r.results["data"]["shots"], r.results["data"]["seed"]) for r in runs]
    assert seen == [(n, shots, seed) for n in ("toy-plain", "toy-styles") for shots in (1, 2) for seed in (1, 2)]
    assert {r.results["data"]["classes"] for r in runs} == {"all"}
    (file,) = (tmp_path / "runs").glob("few_shot-*.json")
    assert json.loads(file.read_text()) == results
    assert (results["schema"], results["protocol"], results["shots"]) == (1, "few-shot", [1, 2])
    for cell, name in zip(results["cells"], ("toy-plain", "toy-styles"), strict=True):
        assert (cell["method"], cell["data"]) == ("coop", name)
        for label, part in (("coop", "results"), ("zero-shot", "zeroshot")):
            for shots in (1, 2):
                own = [r for r in runs if r.results["data"]["name"] == name and r.results["data"]["shots"] == shots]
                row = cell["rows"][label][str(shots)]
                assert row["per_seed"] == [r.results[part]["all"] for r in own]  # exact counts
                values = [100 * one["correct"] / one["total"] for one in row["per_seed"]]
                assert row["mean"] == pytest.approx(statistics.mean(values))
                assert row["deviation"] == pytest.approx(statistics.pstdev(values))
    (average,) = results["average"]
    for label in ("coop", "zero-shot"):
        for shots in ("1", "2"):
            means = [cell["rows"][label][shots]["mean"] for cell in results["cells"]]
            expected = {"mean": statistics.mean(means), "deviation": statistics.pstdev(means)}
            assert average["rows"][label][shots] == pytest.approx(expected)  # each data set once, whatever its size
    assert [row[:2] for row in rows_of(table)] == [
        [name, method] for name in ("toy-plain", "toy-styles", "average") for method in ("zero-shot", "coop")
    ]
    assert "1 shot ┃" in table and "2 shots ┃" in table and "over 2 data sets" in table

    again: list[Run] = []
    assert few_shot([config], (1, 2), (1, 2), datasets=["toy-plain", "toy-styles"], report=again.append) == (
        results,
        table,
    )
    assert all(r.reused for r in again)


def test_one_data_set_has_no_average(tiny: Tiny) -> None:
    results, table = few_shot([tiny("coop"), tiny("zeroshot")], (-1,), (1,))
    assert "average" not in results and "average" not in table and "┃   all ┃" in table
    assert [row[:2] for row in rows_of(table)] == [["folder", "zero-shot"], ["folder", "coop"]]


def test_all_that_is_missing_is_told_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop").with_data(root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"(?s)2 of 3 data sets cannot be used \(dtd, eurosat\).*1\. dtd.*2\. eurosat"):
        few_shot([config], (1,), (1,), datasets=["demo", "dtd", "eurosat"])
    with pytest.raises(DataError, match="(?s)nothing was run, because a data set cannot be used.*dtd"):
        few_shot([config], (1,), (1,), datasets=["demo", "dtd"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("shots", [(), (1, 1)])
def test_shots_that_are_none_or_named_twice(shots: tuple[int, ...], tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="accepted: different numbers of images per class, such as 1,2,4"):
        few_shot([tiny("coop")], shots, (1,))


def test_a_full_table_is_not_wider_than_a_screen() -> None:
    part = {"mean": 88.88, "deviation": 10.0}
    rows: Any = {label: {str(n): part for n in (1, 2, 4, 8, 16)} for label in ("coop", "zero-shot")}
    cell = {"method": "coop", "data": "oxford_flowers", "rows": rows, "oracle": True}
    average = {**cell, "data": "average", "datasets": ["a", "b"]}
    table = few_shot_table([cell], [1, 2, 4, 8, 16], [1, 2, 3], [average])
    assert max(map(len, table.splitlines())) <= 120 and table.count("88.88 ± 10.00") == 20
    assert table.count("coop (oracle)") == 2 and "zero-shot (oracle)" not in table
