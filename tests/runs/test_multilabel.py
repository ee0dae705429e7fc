"""Several labels an image, and metrics other than accuracy, through runs, tables and protocols."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vlprompt
from vlprompt.config.run import RunConfig, TrainerConfig
from vlprompt.datasets import FewShotTask, load_dataset
from vlprompt.engine.metrics import OF_SEVERAL_LABELS
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import base_to_new_table, summary
from vlprompt.protocols.search import search
from vlprompt.runs import session as sessions
from vlprompt.runs.run import run
from vlprompt.runs.tables import results_table

Tiny = Callable[..., RunConfig]


@pytest.fixture
def several() -> FewShotTask:
    """Six classes of the demo; every image has its own class and the next."""
    demo = load_dataset("demo", shots=2)

    def few(samples: list[Any]) -> list[Any]:
        own = [one for one in samples if one.label < 6]
        return [replace(one, label=tuple(sorted({one.label, (one.label + 1) % 6}))) for one in own]

    return replace(
        demo,
        class_names=demo.class_names[:6],
        all_class_names=demo.class_names[:6],
        train=few(demo.train),
        val=few(demo.val),
        test=few(demo.test),
        card=replace(demo.card, task="multilabel", metric="map_11point"),
    )


def trained(name: str, task: FewShotTask, folder: Path) -> vlprompt.Run:
    method = vlprompt.create_method(name, vlprompt.load_backbone("demo"), task.class_names)
    quiet = TrainerConfig(accelerator="cpu", progress=False)
    return vlprompt.train(method, task, output=str(folder), transform="center", trainer=quiet, epochs=1)


def test_zero_shot_on_several_labels(several: FewShotTask, tmp_path: Path) -> None:
    done = trained("zeroshot", several, tmp_path)
    found = done.results["results"]["all"]
    assert set(found) == {"metric", *OF_SEVERAL_LABELS, "total"}
    (table,) = done.class_tables
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["scores"] for row in rows] == ["results"] * 6 + ["zeroshot"] * 6
    assert sum(int(row["images"]) for row in rows[:6]) == 2 * len(several.test)
    for column, metric in (("precision", "cp"), ("recall", "cr"), ("f1", "cf1")):
        assert sum(float(row[column] or 0) for row in rows[:6]) / 6 == pytest.approx(found[metric], abs=1e-3)
    assert found["metric"] == done.results["data"]["metric"] == "map_11point" and found["total"] == len(several.test)
    assert 0 < found["map"] <= 100 and found["map"] != found["map_11point"]
    assert "11-point mAP in %" in done.table() and f"{found['map_11point']:.2f}" in done.table()
    assert "correct/total" not in done.table() and trained("zeroshot", several, tmp_path).reused


def test_training_by_cross_entropy_is_refused_before_anything_is_written(several: FewShotTask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'coop' is trained by cross-entropy over one label.*--method zeroshot"):
        trained("coop", several, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_search_goes_by_the_headline(
    several: FewShotTask, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sessions, "load_task", lambda *_: several)
    config = tiny("zeroshot").with_data(name="demo", root=None)
    found = search(config, {"settings.templates": [["a {}."], ["an emoji of a {}."]]})
    scores = [one["score"]["map_11point"] for one in found.selection["scores"]]
    assert found.selection["chosen"] == {
        "settings.templates": [["a {}.", "an emoji of a {}."][scores.index(max(scores))]]
    }
    assert f"{max(scores):.2f}" in found.table()


def test_mean_per_class_is_shown_and_averaged(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sessions.load_dataset

    def by_class(*args: Any, **values: Any) -> FewShotTask:
        task = usual(*args, **values)
        return replace(task, card=replace(task.card, metric="mean_per_class"))

    monkeypatch.setattr(sessions, "load_dataset", by_class)
    done = run(tiny("coop", lr=0.1))
    found = done.results["results"]["all"]
    rows = list(csv.DictReader((done.folder / "per_class.csv").read_text().splitlines()))[:5]
    correct, total = ([int(row[name]) for row in rows] for name in ("correct", "images"))
    assert total == [3, 2, 4, 3, 1] and sum(correct) == found["correct"]
    each = [a / b for a, b in zip(correct, total, strict=True)]
    assert found["mean_per_class"] == pytest.approx(100 * sum(each) / 5) != pytest.approx(found["accuracy"])
    assert "mean per-class accuracy in %" in done.table() and f"{found['mean_per_class']:.2f}" in done.table()


# -- tables ---------------------------------------------------------------------------------------------------------
def test_base_to_new_averages_headlines_and_says_which() -> None:
    def score(value: float) -> dict[str, Any]:
        return {"metric": "map", "map": value, "map_11point": 1.0, "cf1": 2.0, "of1": 3.0, "total": 9}

    rows = {label: summary([{"base": score(80), "new": score(40)}]) for label in ("coop", "zero-shot")}
    assert rows["coop"]["base"]["mean"] == 80
    cell = {"method": "coop", "data": "voc", "shots": 1, "rows": rows, "metric": "map"}
    alone = base_to_new_table([cell], [1])
    assert alone.startswith("base-to-new mAP in %") and "voc (mAP)" in alone and "53.33" in alone
    plain = {**cell, "data": "demo"}
    del plain["metric"]
    assert base_to_new_table([cell, plain], [1]).startswith("base-to-new score in %")


def test_a_results_table_names_the_metric() -> None:
    results = {"all": {"metric": "map", "map": 61.234, "total": 9}}
    run_ = {"method": "coop", "data": {"name": "voc", "shots": 1, "seed": 1}, "results": results, "zeroshot": results}
    table = results_table([run_])
    assert "voc: mAP in %" in table and table.count("61.23") == 2
