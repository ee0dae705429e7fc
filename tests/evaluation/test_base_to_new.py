"""The base-to-new protocol: several seeds and methods, one table, one file; finished runs are reused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.engine.config import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.evaluation.base_to_new import base_to_new, base_to_new_table, summary
from vlprompt.evaluation.run import Run, harmonic_mean

Tiny = Callable[..., RunConfig]


def scores(base: float, new: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"base": {"accuracy": base}}
    return found | {"new": None if new is None else {"accuracy": new}}


def test_two_methods_over_two_seeds(tiny: Tiny, tmp_path: Path) -> None:
    configs = [tiny("coop", lr=0.2, epochs=3), tiny("mocoop", lr=0.2, epochs=3)]
    runs: list[Run] = []
    results, table = base_to_new(configs, (1, 2), report=runs.append)
    assert [(r.results["method"], r.results["config"]["seed"], r.reused) for r in runs] == [
        *(("coop", 1, False), ("coop", 2, False), ("mocoop", 1, False), ("mocoop", 2, False))
    ]
    (file,) = (tmp_path / "runs").glob("base_to_new-*.json")
    assert json.loads(file.read_text()) == results
    assert (results["schema"], results["protocol"], results["seeds"]) == (1, "base2new", [1, 2])
    for cell, own in zip(results["cells"], (runs[:2], runs[2:]), strict=True):
        for label, part in ((cell["method"], "results"), ("zero-shot", "zeroshot")):
            row = cell["rows"][label]
            assert row["per_seed"] == [r.results[part] for r in own]
            for half in ("base", "new"):
                values = [r.results[part][half]["accuracy"] for r in own]
                assert row[half]["mean"] == pytest.approx(statistics.mean(values))
                assert row[half]["deviation"] == pytest.approx(statistics.pstdev(values))
            assert row["harmonic_mean"] == harmonic_mean(row["base"]["mean"], row["new"]["mean"])
            assert f"{row['base']['mean']:.2f} ± {row['base']['deviation']:.2f}" in table
    assert table.count("zero-shot") == 1 and table.count("coop") == 2 and "seeds 1, 2" in table

    again: list[Run] = []
    assert base_to_new(configs, (1, 2), report=again.append) == (results, table)
    assert all(r.reused for r in again)
    more: list[Run] = []
    base_to_new(configs[:1], (2, 3), report=more.append)
    assert [r.reused for r in more] == [True, False]
    assert len(list((tmp_path / "runs").glob("base_to_new-*.json"))) == 2


def test_summary_takes_the_harmonic_mean_of_the_means() -> None:
    found = summary([scores(90, 30), scores(70, 50)])
    assert found["base"] == {"mean": 80, "deviation": 10} and found["new"] == {"mean": 40, "deviation": 10}
    assert found["harmonic_mean"] == pytest.approx(2 * 80 * 40 / 120)
    assert found["harmonic_mean"] != pytest.approx((harmonic_mean(90, 30) + harmonic_mean(70, 50)) / 2)


def test_methods_without_new_classes_have_a_dash() -> None:
    rows = {"coop": summary([scores(90, None)]), "zero-shot": summary([scores(70, 60)])}
    assert "new" not in rows["coop"] and "harmonic_mean" not in rows["coop"]
    table = base_to_new_table([{"method": "coop", "data": "demo", "shots": 1, "rows": rows}], [7])
    assert "seed 7" in table and "90.00" in table and "±" not in table
    assert next(line for line in table.splitlines() if "coop" in line).count(" - ") == 2


@pytest.mark.parametrize(("configs", "seeds"), [([], (1,)), ([None], ())])
def test_nothing_to_do(configs: list[Any], seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one configuration and one seed, such as --seeds 1,2,3"):
        base_to_new(configs, seeds)


def test_a_seed_twice(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"a seed stands twice in \[1, 1\]"):
        base_to_new([tiny("coop")], (1, 1))
