"""A whole run of PromptKD: images of all classes without their labels, and results that say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.io.head import load_head
from vlprompt.methods.promptkd import PromptKD
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]


def test_a_run_is_taught_on_the_images_of_all_classes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = run(tiny("coop", classes="base", epochs=1))
    shapes, terms = [], PromptKD.terms

    def noted(method: PromptKD, step: Any) -> Any:
        shapes.append(tuple(step.logits.shape))
        return terms(method, step)

    monkeypatch.setattr(PromptKD, "terms", noted)
    settings = {"teacher": str(teacher.folder), "image_depth": 2}
    done = run(tiny("promptkd", settings=settings, classes="base", shots=-1, epochs=2, lr=0.01))
    # 5 classes with 4 training images each, of which 3 are base; two epochs in batches of 4.
    assert done.results["data"]["train"] == 20 and shapes == [(4, 5)] * 10
    assert done.results["results"]["base"]["total"] == 9 and done.results["results"]["new"]["total"] == 4
    assert done.results["test_images"] == "transductive" and "promptkd (transductive)" in done.table()
    assert load_head(done.head_dir).training_facts["test_images"] == "transductive"
    assert "test_images" not in teacher.results
    assert run(tiny("promptkd", settings=settings, classes="base", shots=-1, epochs=2, lr=0.01)).reused
