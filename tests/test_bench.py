"""The benchmarks as commands, on the packaged demo CLIP, with their last line as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.processes import run_script

BENCH = Path(__file__).parents[1] / "bench" / "text_tower.py"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return run_script([sys.executable, str(BENCH), *options])


@pytest.fixture(scope="module")
def report() -> tuple[str, dict[str, Any]]:
    done = bench("--classes", "6", "--context", "2", "--repeats", "1", "--threads", "1", "--model", "demo", "--json")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_the_last_line_is_one_json_object_with_the_ratios(report: tuple[str, dict[str, Any]]) -> None:
    result = report[1]
    assert result["ratio_seconds"] > 0 and result["ratio_memory"] > 0
    assert 0 <= result["max_rel_diff"] <= 1e-5
    assert (result["classes"], result["context"], result["model"]) == (6, 2, "demo")


def test_every_algorithm_is_measured_and_agrees_with_padded(report: tuple[str, dict[str, Any]]) -> None:
    rows = report[1]["algorithms"]
    assert list(rows) == ["packed", "cut", "padded"]
    assert rows["padded"]["tokens"] == 6 * 77
    assert rows["packed"]["tokens"] < rows["cut"]["tokens"] < rows["padded"]["tokens"]
    assert report[1]["ratio_tokens"] == pytest.approx(6 * 77 / rows["packed"]["tokens"])
    for row in rows.values():
        assert row["seconds"] > 0 and row["peak_mb"] > row["above_mb"] >= 0
        assert max(row["rel_diff"].values()) <= 1e-5


def test_the_table_ends_with_the_ratios(report: tuple[str, dict[str, Any]]) -> None:
    lines = report[0].splitlines()
    assert lines[-2].startswith(f"padded / packed: seconds {report[1]['ratio_seconds']:.1f} ")
    assert [line.split()[0] for line in lines[2:5]] == ["packed", "cut", "padded"]


@pytest.mark.parametrize("option", ["--classes", "--context", "--repeats"])
def test_counts_below_one_are_refused(option: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH), option, "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "1 or more" in done.stderr


def test_context_that_is_too_long_fails_with_a_short_message() -> None:
    done = bench("--classes", "2", "--context", "80", "--model", "demo", "--repeats", "1")
    assert done.returncode == 1 and "77 tokens" in done.stdout and len(done.stdout.splitlines()) < 10


def test_loading_images_is_timed_and_compared() -> None:
    command = [sys.executable, str(BENCH.with_name("data.py")), "--images", "30", "--workers", "0,1", "--repeats", "1"]
    done = run_script([*command, "--threads", "1", "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = [(view, workers) for view in ("center", "random", "random-tensor") for workers in (0, 1)]
    assert [(row["view"], row["workers"]) for row in result["rows"]] == rows
    lines = [line.split() for line in done.stdout.splitlines()[2:8]]
    assert [line[:2] for line in lines] == [[view, str(count)] for view, count in rows]
    for line, row in zip(lines, result["rows"], strict=True):  # the table and the JSON have the same ratios
        assert line[-3:] == [f"{row[key]:.2f}" for key in ("ratio_first", "ratio_second", "ratio_again")]


def test_methods_are_timed_and_compared() -> None:
    command = [
        sys.executable,
        str(BENCH.with_name("methods.py")),
        "--model",
        "demo",
        "--methods",
        "cocoop,maple,mocoop",
    ]
    done = run_script([*command, "--classes", "3", "--repeats", "1", "--json"])
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["method"], row["classes"]) for row in rows] == [("cocoop", 3), ("maple", 3), ("mocoop", 3)]
    for row in rows:
        assert row["ratio_seconds"] > 0 and row["ratio_memory"] > 0 and row["max_rel_diff"] < 1e-3
