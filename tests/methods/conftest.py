"""Fixtures: a folder of small images, and features of the same frozen texts that are encoded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from tests.fixtures.runs import image_folder
from vlprompt.prompts import zero_shot

__all__ = ["image_folder", "same_texts_once"]

_MEANS: dict[Any, Tensor] = {}


@pytest.fixture(scope="module", autouse=True)
def same_texts_once() -> Iterator[None]:
    """Every test makes its methods again, with PromptSRC's 60 templates of the same classes on the same backbone."""
    usual = zero_shot._mean

    def kept(backbone: Any, class_names: Any, templates: Any, unit: bool) -> Tensor:
        key = (backbone, backbone.model.logit_scale.dtype, repr(class_names), repr(templates), unit)
        if key not in _MEANS:
            found = usual(backbone, class_names, templates, unit=unit)
            if found.is_inference():
                return found
            _MEANS[key] = found
        return _MEANS[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "_mean", kept)
        yield
