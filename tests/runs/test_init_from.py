"""Runs that start from another run's head: TPT on CoOp, CoOp on CoOp; and heads that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlprompt.config.run import RunConfig
from vlprompt.errors import HeadError, VlpromptError
from vlprompt.runs.run import Run, run

Tiny = Callable[..., RunConfig]


@pytest.fixture
def coop(tiny: Tiny) -> Run:
    return run(tiny("coop", epochs=3, lr=0.1))


@pytest.mark.parametrize("place", ["run", "head"])
def test_tpt_without_steps_scores_like_the_head_it_starts_from(tiny: Tiny, coop: Run, place: str) -> None:
    start = str(coop.folder if place == "run" else coop.head_dir)
    done = run(tiny("tpt", settings={"crops": 3, "steps": 0}, init_from=start))
    found, expected = ((each.folder / "confusion.csv").read_text().splitlines() for each in (done, coop))
    assert [row for row in found if row.startswith("results,")] == [
        row for row in expected if row.startswith("results,")
    ]
    assert done.results["config"]["init_from"] == start
    context = done.head().method.trained_state()["ctx"]
    assert torch.equal(context, coop.head().method.trained_state()["prompt.ctx"])


def test_tuning_moves_on_from_the_start(tiny: Tiny, coop: Run) -> None:
    tuned = run(tiny("tpt", settings={"crops": 9, "lr": 0.05}, init_from=str(coop.folder)))
    assert tuned.results["test_images"] == "test-tuned"
    # The head keeps the start; each image's own context is forgotten.
    context = tuned.head().method.trained_state()["ctx"]
    assert torch.equal(context, coop.head().method.trained_state()["prompt.ctx"])


def test_training_goes_on_from_another_run(tiny: Tiny, coop: Run) -> None:
    again = run(tiny("coop", epochs=1, lr=1e-9, warmup_epochs=0, init_from=str(coop.folder)))
    assert again.folder != coop.folder
    states = [one.head().method.trained_state()["prompt.ctx"] for one in (again, coop)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)


def test_heads_that_do_not_fit(tiny: Tiny, coop: Run, tmp_path: Path) -> None:
    zeroshot = run(tiny("zeroshot"))
    with pytest.raises(HeadError, match="starts from one set of context vectors"):
        run(tiny("tpt", init_from=str(zeroshot.folder)))
    with pytest.raises(HeadError, match=r"prompt\.ctx: shape"):
        run(tiny("coop", settings={"context_init": "", "context_length": 2}, init_from=str(coop.folder)))
    with pytest.raises(VlpromptError, match="nowhere"):
        run(tiny("tpt", init_from=str(tmp_path / "nowhere")))
