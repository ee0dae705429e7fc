"""The benchmark of test-time methods as a command, with its last line as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.processes import run_script

BENCH = Path(__file__).parents[2] / "bench" / "testtime.py"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return run_script([sys.executable, str(BENCH), *options])


def test_tpt_and_tda_are_timed_and_agree() -> None:
    options = ("--classes", "6", "--images", "2", "--stream", "20", "--threads", "1", "--model", "demo", "--json")
    done = bench("--method", "tpt,tda", *options)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [line.split()[:2] for line in lines] == [["tpt", "6"], ["tda", "6"]]
    assert [row["method"] for row in result["rows"]] == ["tpt", "tda"] and result["model"] == "demo"
    for line, row in zip(lines, result["rows"], strict=True):
        assert f"x{row['ratio_seconds']:.1f} " in line  # the table and the JSON have the same ratio
        assert 0 <= row["max_rel_diff"] <= 1e-4
    assert result["ratio_seconds"] == min(row["ratio_seconds"] for row in result["rows"])
    assert result["max_rel_diff"] == max(row["max_rel_diff"] for row in result["rows"])


@pytest.mark.parametrize(("option", "value"), [("--classes", "0"), ("--images", "-1"), ("--method", "tpt,coop")])
def test_unaccepted_values_are_refused(option: str, value: str) -> None:
    done = bench(option, value)
    assert done.returncode == 2 and "accepted" in done.stderr
