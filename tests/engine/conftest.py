"""A module, a few-shot task and a method small enough for a training step of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl

from vlprompt.datasets import FewShotTask, load_dataset
from vlprompt.methods import PromptMethod, create_method

MIXTURE = {"templates": ["a photo of a {}.", "an icon of a {}.", "a {} drawn."], "groups": [1, 1, 1]}


@pytest.fixture(scope="session")
def task() -> FewShotTask:
    """Six classes of the demo, 2 training, 1 validation and 3 test images each but for the last: 17 in all."""
    demo = load_dataset("demo", shots=2)

    def few(samples: list[Any], each: int) -> list[Any]:
        return [one for label in range(6) for one in [s for s in samples if s.label == label][:each]]

    names = demo.class_names[:6]
    return replace(
        demo,
        class_names=names,
        all_class_names=names,
        train=few(demo.train, 2),
        val=few(demo.val, 1),
        test=few(demo.test, 3)[:-1],
    )


@pytest.fixture
def make_method(tiny_backbone: Any, task: FewShotTask) -> Callable[..., PromptMethod]:
    """``make_method("mocoop", tune_layer_norms=False)`` on the miniature CLIP."""

    def make(name: str = "coop", **settings: Any) -> PromptMethod:
        pl.seed_everything(1, verbose=False)
        own = {"coop": {"context_init": "a photo of a"}, "mocoop": MIXTURE, "zeroshot": {}}[name]
        return create_method(name, tiny_backbone, task.class_names, **{**own, **settings})

    return make


@pytest.fixture
def own_trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    """A user's own Trainer: Lightning's defaults, and whatever is given."""

    def make(**values: Any) -> pl.Trainer:
        given = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
        return pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **{**given, **values})

    return make
