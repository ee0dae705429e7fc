"""The benchmark of meta-training as a command, on the packaged demo CLIP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.fixtures.processes import run_script

BENCH = Path(__file__).parents[2] / "bench" / "meta.py"


def test_both_orders_are_compared_with_a_plain_training_step() -> None:
    options = ["--model", "demo", "--methods", "coop", "--pairs", "3", "--tasks", "2", "--repeats", "1", "--json"]
    done = run_script([sys.executable, str(BENCH), *options])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (row["method"], row["tasks"], row["pairs"]) == ("coop", 2, 3)
    for kind in ("own", "first", "second"):
        assert row[kind]["seconds"] > 0 and row[kind]["megabytes"] > 100
    assert f"x{row['ratio_second']:.1f} " in done.stdout.splitlines()[-2]  # the table and the JSON have the same ratio
