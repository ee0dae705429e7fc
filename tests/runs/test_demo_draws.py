"""The demo behaves as CLIP does on photographs: what CoOp gains on base classes it pays for on new ones, in every draw.

The command is that of `make demo-all`, with CoOp alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlprompt.cli.main import main

DRAWS = ("demo", "demo-2", "demo-3")


@pytest.mark.slow
def test_coop_gains_on_base_and_loses_on_new_in_every_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["base-to-new", "--config", "configs/coop/demo.yaml", "--datasets", ",".join(DRAWS), "--seeds", "1"]
    words += ["--trainer.progress", "false", "--output", str(tmp_path)]
    assert main(words) == 0
    (file,) = tmp_path.glob("base_to_new-*.json")
    cells = json.loads(file.read_text())["cells"]
    assert tuple(cell["data"] for cell in cells) == DRAWS
    for cell in cells:
        zero_shot, coop = cell["rows"]["zero-shot"], cell["rows"]["coop"]
        assert zero_shot["base"]["mean"] > 40 and zero_shot["new"]["mean"] > 40  # of 50 classes: chance is 2 %
        assert coop["base"]["mean"] > zero_shot["base"]["mean"], cell["data"]
        assert coop["new"]["mean"] < zero_shot["new"]["mean"], cell["data"]
    assert capsys.readouterr().out.count("average") >= 2
