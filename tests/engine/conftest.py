"""A small few-shot task, methods on the tiny CLIP, and a user's Trainer."""

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
    """Six classes of the demo with 2 training, 1 validation and 3 test images each; the last one has 2 test images."""
    demo = load_dataset("demo", shots=2)

    def few(samples: list[Any], count: int) -> list[Any]:
        return [sample for label in range(6) for sample in [s for s in samples if s.label == label][:count]]

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
    """``make_method("mocoop", tune_layer_norms=False)`` creates a method on the tiny CLIP."""

    def make(name: str = "coop", **settings: Any) -> PromptMethod:
        pl.seed_everything(1, verbose=False)
        defaults = {"coop": {"context_init": "a photo of a"}, "mocoop": MIXTURE, "zeroshot": {}}[name]
        return create_method(name, tiny_backbone, task.class_names, **{**defaults, **settings})

    return make


@pytest.fixture
def user_trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    """A user's Trainer: Lightning's defaults and the given values."""

    def make(**values: Any) -> pl.Trainer:
        defaults = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
        return pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **{**defaults, **values})

    return make
