"""CSV files of scores and counts by class: their content, names that a spreadsheet would run, and their size."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.engine.metrics import ClassCounts
from vlprompt.errors import printable
from vlprompt.runs.class_tables import CONFUSION, PER_CLASS, class_tables, write_class_tables
from vlprompt.runs.run import run

COUNTS = ClassCounts([2, 0, 1], [3, 1, 1], [2, 0, 3], {(0, 2): 1, (1, 2): 1})


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_files_by_hand(tmp_path: Path) -> None:
    unseen = ClassCounts([1, 0], [1, 0], [1, 0], {})
    new = {"new": (["d", "e"], unseen)}
    write_class_tables(tmp_path, {"results": {"base": (["a", "b, c", 'c "d"'], COUNTS), **new}, "zeroshot": new})
    assert (tmp_path / PER_CLASS).read_text().splitlines() == [
        "scores,classes,label,class,images,answers,correct,precision,recall,f1",
        "results,base,0,a,3,2,2,100.0000,66.6667,80.0000",
        'results,base,1,"b, c",1,0,0,0.0000,0.0000,0.0000',
        'results,base,2,"c ""d""",1,3,1,33.3333,100.0000,50.0000',
        "results,new,0,d,1,1,1,100.0000,100.0000,100.0000",
        "results,new,1,e,0,0,0,,,",
        "zeroshot,new,0,d,1,1,1,100.0000,100.0000,100.0000",
        "zeroshot,new,1,e,0,0,0,,,",
    ]
    assert (tmp_path / CONFUSION).read_text().splitlines() == [
        "scores,classes,label,class,answer,answer_class,images",
        "results,base,0,a,0,a,2",
        'results,base,0,a,2,"c ""d""",1',
        'results,base,1,"b, c",2,"c ""d""",1',
        'results,base,2,"c ""d""",2,"c ""d""",1',
        "results,new,0,d,0,d,1",
        "zeroshot,new,0,d,0,d,1",
    ]
    assert class_tables(tmp_path) == [tmp_path / PER_CLASS, tmp_path / CONFUSION]
    assert {path.name for path in tmp_path.iterdir()} == {PER_CLASS, CONFUSION}


def test_several_labels_have_no_confusions(tmp_path: Path) -> None:
    write_class_tables(tmp_path, {"results": {"all": (["a"], ClassCounts([1], [2], [2]))}}, "voc-")
    assert [path.name for path in tmp_path.iterdir()] == ["voc-per_class.csv"]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        (" @SUM(A1)", " '@SUM(A1)"),
        ("+49", "'+49"),
        ("-1", "'-1"),
        ("\uff1d1", "'\uff1d1"),
        ("a;=cmd|' /C calc'!A0", "a;'=cmd|' /C calc'!A0"),
        ('a,"=1"', 'a,"\'=1"'),
        ("t-shirt + tie = 2", "t-shirt + tie = 2"),
        ("\x1b[2Jcat\r\n=2", r"\x1b[2Jcat\r =2"),
    ],
)
def test_names_are_neither_formulas_nor_controls(name: str, cell: str, tmp_path: Path) -> None:
    write_class_tables(tmp_path, {"results": {"all": ([name, "b", "c"], COUNTS)}})
    for path in class_tables(tmp_path):
        text = path.read_text()
        assert text == printable(text) and text.count("\n") == len(rows_of(path)) + 1
        assert rows_of(path)[0]["class"] == cell


def test_files_grow_with_the_mistakes_and_not_with_pairs_of_classes(tmp_path: Path) -> None:
    many = 5000
    counts = ClassCounts([0] * many, [1] * many, [many, *[0] * (many - 1)], {(row, 0): 1 for row in range(1, many)})
    write_class_tables(tmp_path, {"results": {"all": ([f"class {row}" for row in range(many)], counts)}})
    assert sum(path.stat().st_size for path in class_tables(tmp_path)) < 2**20


def test_a_run_writes_its_counts_next_to_small_results(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tiny("coop", classes="base", lr=0.2))
    per_class, confusion = done.class_tables
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows_of(per_class):
        found.setdefault((row["scores"], row["classes"]), []).append(row)
    assert list(found) == [(part, half) for part in ("results", "zeroshot") for half in ("base", "new")]
    for (part, half), rows in found.items():
        score: dict[str, Any] = done.results[part][half]
        assert [int(row["label"]) for row in rows] == list(range(3 if half == "base" else 2))
        assert sum(int(row["images"]) for row in rows) == score["total"] == (9 if half == "base" else 4)
        assert sum(int(row["correct"]) for row in rows) == score["correct"]
        for name in ("precision", "recall", "f1"):
            values = [float(row[name]) for row in rows if row[name]]
            assert sum(values) / len(values) == pytest.approx(score[name], abs=1e-3)
        pairs = [row for row in rows_of(confusion) if (row["scores"], row["classes"]) == (part, half)]
        assert sum(int(row["images"]) for row in pairs) == score["total"]
        assert sum(int(row["images"]) for row in pairs if row["label"] == row["answer"]) == score["correct"]
    assert "per_class" not in done.results
    from vlprompt.cli.main import main

    assert main(["train", "--config", str(done.folder / "config.yaml"), "--metrics", "precision,recall,f1"]) == 0
    text = capsys.readouterr().out
    assert f"by class:   {per_class}\nby class:   {confusion}\n" in text
    for name, words in (("precision", "macro precision"), ("recall", "macro recall"), ("f1", "macro F1")):
        scores = done.results["results"]["base"]
        assert f"{words} in %" in text and f" {scores[name]:.2f} " in text
