"""The base-to-new protocol: several seeds and methods, one table, one file; finished runs are reused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import average_of, base_to_new, base_to_new_table, summary
from vlprompt.runs.run import Run, harmonic_mean

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
    assert table.count("zero-shot") == 2 and table.count("coop") == 2 and "seeds 1, 2" in table

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
    assert next(line for line in table.splitlines() if "coop" in line).count(" - ") == 4  # new, H, and no cost is known


# -- several data sets ----------------------------------------------------------------------------------------------
def test_two_methods_on_two_data_sets(tiny: Tiny, toy_sets: Path, tmp_path: Path) -> None:
    configs = [
        tiny(method, lr=0.2, **template).with_data(root=str(toy_sets), name="nothing of the kind")
        for method, template in (("coop", {}), ("mocoop", {"template": "a drawing of a {}."}))
    ]
    runs: list[Run] = []
    results, table = base_to_new(configs, (1,), datasets=["plainest", "toy-styles"], report=runs.append)
    seen = [(r.results["method"], r.results["data"]["name"], r.results["data"]["template"]) for r in runs]
    assert seen == [
        *(("coop", name, "an emoji of a {}.") for name in ("toy-plain", "toy-styles")),
        *(("mocoop", name, "a drawing of a {}.") for name in ("toy-plain", "toy-styles")),
    ]
    assert [(cell["method"], cell["data"]) for cell in results["cells"]] == [one[:2] for one in seen]
    for index, method in enumerate(("coop", "mocoop")):
        average = results["average"][index]
        assert (average["method"], average["datasets"]) == (method, ["toy-plain", "toy-styles"])
        for label in (method, "zero-shot"):
            own = [cell["rows"][label] for cell in results["cells"][2 * index : 2 * index + 2]]
            row = average["rows"][label]
            for half in ("base", "new"):
                means = [one[half]["mean"] for one in own]
                assert row[half] == {"mean": statistics.fmean(means), "deviation": statistics.pstdev(means)}
            assert row["harmonic_mean"] == harmonic_mean(row["base"]["mean"], row["new"]["mean"])
    (file,) = (tmp_path / "runs").glob("base_to_new-*.json")
    assert json.loads(file.read_text()) == results
    # Zero-shot has the template of the method that it is compared with; that of the card is not named.
    rows = ("zero-shot", "coop", "zero-shot (a drawing of a {}.)", "mocoop")
    assert [row[:2] for row in rows_of(table)] == [
        [name, method] for name in ("toy-plain", "toy-styles", "average") for method in rows
    ]
    assert "±" in rows_of(table)[-1][2] and "±" not in rows_of(table)[0][2]  # one seed, but two data sets

    again: list[Run] = []
    alone, _ = base_to_new([configs[0].with_data(name="toy-plain")], (1,), report=again.append)
    assert again[0].reused and "average" not in alone and alone["cells"] == results["cells"][:1]
    one, table = base_to_new(configs[:1], (1,), datasets=["toy-plain"])
    assert one["cells"] == alone["cells"] and one["average"][0]["rows"]["coop"]["base"]["deviation"] == 0
    assert "±" not in table and len(list((tmp_path / "runs").glob("base_to_new-*.json"))) == 3


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]


def cell_of(data: str, coop: tuple[float, float | None], **more: Any) -> dict[str, Any]:
    rows = {"coop": summary([scores(*coop)]), "zero-shot": summary([scores(50, 50)])}
    return {"method": "coop", "data": data, "shots": 1, "rows": rows, **more}


def test_h_of_the_average_is_that_of_the_averages() -> None:
    cells = [cell_of("one", (90, 30)), cell_of("two", (70, 50))]
    average = average_of(cells)
    assert average["rows"]["coop"] == {
        "base": {"mean": 80, "deviation": 10},
        "new": {"mean": 40, "deviation": 10},
        "harmonic_mean": pytest.approx(2 * 80 * 40 / 120),
        "mean_of_harmonic_means": pytest.approx((45 + 2 * 70 * 50 / 120) / 2),
    }
    table = base_to_new_table(cells, [1], [average])
    assert rows_of(table)[-1] == ["average", "coop", "80.00 ± 10.00", "40.00 ± 10.00", "53.33", "-", "-"]
    words = " ".join(table.split())
    assert "average: mean and deviation over 2 data sets; its H is the harmonic mean of these averages" in words
    assert "not to be confused with the mean of the data sets' H: zero-shot 50.00, coop 51.67" in words
    assert "average" not in base_to_new_table(cells, [1])


@pytest.mark.parametrize(
    ("base", "new", "published"),
    [
        (69.34, 74.22, 71.70),  # CLIP
        (82.69, 63.22, 71.66),  # CoOp
        (80.47, 71.69, 75.83),  # CoCoOp
        (82.28, 75.14, 78.55),  # MaPLe
        (84.26, 76.10, 79.97),  # PromptSRC
        (84.21, 71.79, 77.51),  # IVLP
    ],
)
def test_published_average_rows_are_reproduced(base: float, new: float, published: float) -> None:
    # Two data sets around the published averages: the mean of their own H is another number.
    cells = [cell_of(name, (base + off, new - 2 * off)) for name, off in (("one", 5), ("two", -5))]
    row = average_of(cells)["rows"]["coop"]
    assert round(row["harmonic_mean"], 2) == published != round(row["mean_of_harmonic_means"], 2)


def test_a_method_without_new_classes_on_one_data_set_has_no_average_of_them() -> None:
    cells = [cell_of("one", (90, 30)), cell_of("two", (70, None))]
    assert average_of(cells)["rows"]["coop"] == {"base": {"mean": 80, "deviation": 10}}
    assert rows_of(base_to_new_table(cells, [1], [average_of(cells)]))[-1][3:] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "datasets: none is named"),
        (["dmo"], "'dmo' is no data set. Did you mean 'demo'"),
        (["dtd", "DescribableTextures"], "'dtd' is named twice"),
    ],
)
def test_data_sets_that_cannot_be_averaged(names: list[str], message: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        base_to_new([tiny("coop")], (1,), datasets=names)
    assert not (tmp_path / "runs").exists()


# -- nothing to do --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("configs", "seeds"), [([], (1,)), ([None], ())])
def test_nothing_to_do(configs: list[Any], seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one configuration and one seed, such as --seeds 1,2,3"):
        base_to_new(configs, seeds)


def test_a_seed_twice(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"a seed is given twice in \[1, 1\]"):
        base_to_new([tiny("coop")], (1, 1))
