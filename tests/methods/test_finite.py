"""Values that are not finite: no method scores or saves them, whatever learned, fitted or averaged them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.test_every_method import every_method, make
from vlprompt._finite import check_finite, not_finite
from vlprompt.backbone import Backbone
from vlprompt.engine.metrics import checked_logits
from vlprompt.errors import DataError, NotFiniteError
from vlprompt.io.head import Head
from vlprompt.methods.fitted import FittedMethod


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_head_is_saved(
    value: float, tiny_backbone: Backbone, name: str, own: Mapping[str, Any], tmp_path: Path
) -> None:
    method = make(tiny_backbone, name, own)
    learned = [tensor for tensor in method._kept().values() if tensor.numel()]
    if not learned:
        pytest.skip(f"{name} keeps nothing before it is fitted")
    with torch.no_grad():
        learned[0].view(-1)[0] = value
    with pytest.raises(NotFiniteError, match="not finite"):
        Head(method).save_pretrained(tmp_path / "head")
    assert not list(tmp_path.iterdir())


@every_method
def test_features_that_are_not_finite_are_not_fitted(
    tiny_backbone: Backbone, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    if not isinstance(method, FittedMethod):
        pytest.skip(f"{name} is not fitted")
    features = torch.randn(10, tiny_backbone.embed_dim, generator=torch.Generator().manual_seed(0))
    features[3, 0] = float("nan")
    labels = torch.arange(10) % 5
    with pytest.raises((DataError, NotFiniteError), match="not finite"):
        method.cache.fit(features, labels)
    assert not not_finite(method.trained_state())


def test_scores_that_are_not_finite_are_no_scores() -> None:
    logits = torch.zeros(3, 4)
    assert checked_logits(logits, "coop") is logits
    logits[1, 2] = float("nan")
    with pytest.raises(NotFiniteError, match="scores of 1 of 3 images by coop are not finite"):
        checked_logits(logits, "coop")


def test_the_culprit_is_named() -> None:
    tensors = {
        "a": torch.ones(2),
        "b": torch.tensor([1.0, torch.inf, torch.nan]),
        "c": torch.ones(2, dtype=torch.uint8),
    }
    with pytest.raises(NotFiniteError, match=r"^here gave values .*:\n  - b: 2 of 3 values are not finite\ndo this$"):
        check_finite(tensors, "here", "do this")
