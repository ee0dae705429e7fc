"""What a results file records of its data, so that two runs that disagree can be explained (datasets.md 6.5)."""

from __future__ import annotations

from typing import Any

import torch

from vlprompt.backbone import Backbone
from vlprompt.data import describe_transform, test_transform
from vlprompt.datasets import FewShotTask
from vlprompt.errors import DataError
from vlprompt.methods import PromptMethod
from vlprompt.objectives import feature_shift

SHIFT_IMAGES = 64
PROTOCOLS = {"all": "all classes", "base": "base to new", "new": "new classes"}


def data_record(task: FewShotTask, backbone: Backbone, view: str) -> dict[str, Any]:
    """Return what identifies the data of a run: the task's own description, and the views as text.

    Args:
        task: The task.
        backbone: Whose preprocessing the views have.
        view: The training view, ``random`` or ``center``.
    """
    seen = {part: describe_transform(backbone.preprocess, kind) for part, kind in (("train", view), ("test", "center"))}
    return {**task.describe(), "protocol": PROTOCOLS[task.classes], "transform": seen}


def shift_record(method: PromptMethod, task: FewShotTask) -> dict[str, Any] | None:
    """Return how far the learnables moved text and image features; None where nothing is learned.

    The image side is measured on the first 64 test images that can be read (:func:`vlprompt.objectives.feature_shift`).
    """
    if not method.trainable_parameters():
        return None
    view, pictures = test_transform(method.backbone.preprocess), []
    for sample in task.test[:SHIFT_IMAGES] if method.sees_images else ():
        try:
            pictures.append(view(sample.source.open()))
        except DataError:  # said where images are scored
            continue
    images = torch.stack(pictures).to(method.backbone.device) if pictures else None
    return {**feature_shift(method, images, task.template), "images": len(pictures)}
