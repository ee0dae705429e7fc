"""The test-time protocol: own values for every data set, several orders, and means over data sets and groups."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.engine.metrics import headline
from vlprompt.protocols import test_time
from vlprompt.protocols.test_time import compare_test_time
from vlprompt.runs.run import Run

Tiny = Callable[..., RunConfig]
SETS = ["toy-plain", "toy-styles", "demo-kinds"]


@pytest.fixture
def stream(tiny: Tiny, toy_sets: Path) -> RunConfig:
    config = tiny("tda", {"positive_alpha": 5.0, "positive_capacity": 1}, shots=1)
    return config.with_data(name="toy-styles", root=str(toy_sets))


def test_orders_give_a_mean_and_a_deviation(
    stream: RunConfig, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        test_time, "list_groups", lambda: {"toys": SETS[:2], "all": SETS, "other": ["toy-plain", "dtd"]}
    )
    seeds = (1, 2, 3, 4)
    runs: list[Run] = []
    results, table = compare_test_time([stream], seeds, datasets=SETS, with_groups=True, report=runs.append)
    (file,) = (tmp_path / "runs").glob("test_time-*.json")
    assert json.loads(file.read_text()) == results and results["protocol"] == "test-time"
    assert [(cell["method"], cell["data"]) for cell in results["cells"]] == [("tda", name) for name in SETS]
    values = {}
    for cell in results["cells"]:
        own = [run for run in runs if run.results["data"]["name"] == cell["data"]]
        assert cell["orders"] == [{"kind": "shuffled", "seed": seed} for seed in seeds]
        values[cell["data"]] = [headline(run.results["results"]["all"]) for run in own]
        row = cell["rows"]["tda"]
        assert row["mean"] == pytest.approx(statistics.mean(values[cell["data"]]))
        assert row["deviation"] == pytest.approx(statistics.pstdev(values[cell["data"]]))
        assert cell["rows"]["zero-shot"]["deviation"] == 0.0
    assert any(cell["rows"]["tda"]["deviation"] > 0 for cell in results["cells"])
    (means,) = results["means"]
    for words, members in (("mean of 3 data sets", SETS), ("mean of 2 in toys", SETS[:2])):
        by_seed = [statistics.mean(one) for one in zip(*(values[name] for name in members), strict=True)]
        expected = {"mean": statistics.mean(by_seed), "deviation": statistics.pstdev(by_seed)}
        assert means["rows"]["tda"][words] == pytest.approx(expected) and words in table
    assert set(means["rows"]["tda"]) == {"mean of 3 data sets", "mean of 2 in toys"}
    assert (
        "tda (online)" in table
        and "mean and deviation over seeds 1, 2, 3, 4" in table
        and table.endswith(
            "no deviation: the results of zero-shot do not depend on the seed\n"
            "tda (online): the seeds draw the order of the test images only"
        )
        and table.count("zero-shot") == 2
    )

    again: list[Run] = []
    assert compare_test_time([stream], seeds, datasets=SETS, with_groups=True, report=again.append)[0] == results
    assert all(run.reused for run in again)


def test_methods_are_compared_and_one_data_set_needs_no_mean(stream: RunConfig, tiny: Tiny) -> None:
    other = tiny("mta", {"crops": 2}, shots=1).with_data(name="toy-styles", root=stream.data.root)
    results, table = compare_test_time([stream, other], (1,), datasets=["toy-plain"])
    assert [cell["method"] for cell in results["cells"]] == ["tda", "mta"] and results["means"] == []
    assert "mta" in table and "mean of" not in table and "seed 1" in table
