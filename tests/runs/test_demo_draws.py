"""The demo behaves as CLIP does on photographs: what CoOp gains on base classes it pays for on new ones, in every draw.

The command is that of `make demo-all`, with CoOp alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlprompt.cli.main import main


@pytest.mark.slow
@pytest.mark.covering(every=3)
@pytest.mark.parametrize("draw", ["demo", "demo-2", "demo-3"])
def test_coop_gains_on_base_and_loses_on_new(draw: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["base-to-new", "--config", "configs/coop/demo.yaml", "--datasets", draw, "--seeds", "1"]
    assert main([*words, "--trainer.progress", "false", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("base_to_new-*.json")
    (cell,) = json.loads(file.read_text())["cells"]
    zero_shot, coop = cell["rows"]["zero-shot"], cell["rows"]["coop"]
    assert cell["data"] == draw
    assert zero_shot["base"]["mean"] > 40 and zero_shot["new"]["mean"] > 40  # of 50 classes: chance is 2 %
    assert coop["base"]["mean"] > zero_shot["base"]["mean"]
    assert coop["new"]["mean"] < zero_shot["new"]["mean"]
    assert capsys.readouterr().out.count("average") >= 2
