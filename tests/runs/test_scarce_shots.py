"""Headings that give the number of shots name the images that were used if a class has fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.datasets import load_dataset
from vlprompt.datasets.records import shots_in_words
from vlprompt.protocols.fewshot import few_shot_table
from vlprompt.runs.dry_run import dry_run
from vlprompt.runs.run import run
from vlprompt.runs.tables import shots_of


@pytest.mark.parametrize(
    ("shots", "per_class", "words"),
    [
        (16, [16, 16], "16 shots"),
        (1, [1, 1], "1 shot"),
        (40, [12, 12], "40 shots (12 a class available)"),
        (40, [3, 40], "40 shots (3 to 40 a class available)"),
        (1, [0, 1], "1 shot (0 to 1 a class available)"),
        (-1, [3, 250], "all images"),
        (16, [0, 0], "no training images"),
        (16, [32, 32], "16 shots"),  # classes of both halves, for methods without labels
        (16, None, "16 shots"),  # results of older versions
    ],
)
def test_words(shots: int, per_class: Sequence[int] | None, words: str) -> None:
    assert shots_in_words(shots, per_class) == words
    assert shots_of({"shots": shots} if per_class is None else {"shots": shots, "shots_per_class": per_class}) == words


@pytest.mark.parametrize(
    ("shots", "words"), [(40, "40 shots (4 a class available)"), (1, "1 shot"), (-1, "all images")]
)
def test_the_table_of_a_run(shots: int, words: str, tiny: Callable[..., RunConfig]) -> None:
    done = run(tiny("zeroshot", shots=shots))
    assert done.table().splitlines()[0] == f"folder: accuracy in %, {words}, seed 1"
    assert done.results["data"]["shots_per_class"] == ([1, 1] if shots == 1 else [4, 4])


def test_a_dry_run_counts_one_epoch(tiny: Callable[..., RunConfig]) -> None:
    assert "x 1 epoch = " in dry_run(tiny("coop", epochs=1))
    assert "in 1 epoch\n" in dry_run(tiny("coop", steps=1)) + "\n"


def test_the_draw_on_the_command_line(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlprompt.cli.main import main

    assert main(["data", "shots", "folder", "--root", str(image_folder), "--shots", "9"]) == 0
    assert "9 shots (4 a class available)" in capsys.readouterr().out
    assert load_dataset("folder", root=image_folder, shots=9).shots_per_class() == [4, 4]


def test_the_few_shot_table_has_a_line_per_data_set() -> None:
    def cell(data: str, method: str, most: int) -> dict[str, Any]:
        spread = {"mean": 50.0, "deviation": 0.0}
        rows = {label: {"1": spread, "40": spread} for label in ("zero-shot", method)}
        return {"method": method, "data": data, "rows": rows, "shots_per_class": {"1": [1, 1], "40": [3, most]}}

    cells = [cell("few", "coop", 12), cell("few", "cocoop", 12), cell("others", "coop", 40)]
    lines = few_shot_table(cells, [1, 40], [1]).splitlines()
    assert lines[-2:] == ["few: 40 shots (3 to 12 a class available)", "others: 40 shots (3 to 40 a class available)"]
    plenty = cell("enough", "coop", 40)
    plenty["shots_per_class"]["40"] = [40, 40]
    assert "available" not in few_shot_table([plenty], [1, 40], [1])
