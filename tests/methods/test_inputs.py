"""What every method accepts: images of the size of its backbone, also of a requested one, and raw features."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.methods.test_every_method import LABELS, NAMES, make, score, steps
from vlprompt import list_methods, load_backbone
from vlprompt.backbone import Backbone
from vlprompt.caches.base import FeatureClassifier
from vlprompt.errors import DataError
from vlprompt.io.head import Head, load_head
from vlprompt.methods import get_method_class
from vlprompt.methods.fitted import FittedMethod
from vlprompt.testtime.mta import mean_shift
from vlprompt.testtime.selection import filter_views
from vlprompt.testtime.tda import summarise
from vlprompt.testtime.zero import vote


@pytest.fixture(scope="module")
def larger(tiny_state_dict: Callable[..., dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The miniature CLIP of 64 pixels for images of 96."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tiny_state_dict(), path)
    return load_backbone("from-file", path, image_size=96)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_works_with_a_requested_image_size(name: str, larger: Backbone, tmp_path: Any) -> None:
    method = make(larger, name, {})
    images = torch.randn(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    losses = list(steps(method.train(), images, LABELS, 2))
    assert all(loss >= 0 for loss in losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # single views of test-time methods
        logits = score(method.eval(), images)
        assert logits.shape == (6, len(NAMES)) and bool(logits.isfinite().all())
        again = load_head(Head(method).save_pretrained(tmp_path / "head"))
        assert again.backbone.preprocess.size == 96
        torch.testing.assert_close(score(again.method, images), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_refuses_other_inputs(name: str, larger: Backbone) -> None:
    method, size, dim = make(larger, name, {}), 96, larger.embed_dim
    head = Head(method)
    expected = re.escape(f"[B, 3, {size}, {size}] or [B, {dim}]")
    one_image = torch.zeros(3, size, size)
    wrong = [
        one_image,
        torch.zeros(2, 3, size, size, dtype=torch.uint8),
        torch.zeros(2, 1, size, size),
        torch.zeros(2, size, size, 3),
        torch.zeros(2, 3, size, size + 8),
        torch.zeros(2, dim + 1),
        torch.zeros(dim),
        torch.zeros(()),
        torch.zeros(2, 3, dim + 1),
    ]
    for inputs in wrong:
        shape = re.escape(f"the inputs of {name} are {list(inputs.shape)} of {inputs.dtype}")
        for call in (head, method, lambda x: method.losses(x, LABELS[:2])):
            with pytest.raises(DataError, match=f"{shape}.*{expected}"):
                call(inputs)
    with pytest.raises(DataError, match=r"image\[None\]"):
        head(one_image)
    with pytest.raises(DataError, match=rf"image features are \[3\] of torch.float32; accepted: floats \[B, {dim}\]"):
        head.text_features(torch.zeros(3))


FITTED = [name for name in list_methods() if issubclass(get_method_class(name), FittedMethod)]


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("fitted", [False, True])
def test_every_cache_refuses_other_features(name: str, fitted: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    kind: Any = get_method_class(name)
    cache: FeatureClassifier = kind.Cache(F.normalize(torch.randn(3, 8, generator=draw), dim=-1))
    if fitted:
        fit: Any = cache.fit
        fit(torch.randn(12, 8, generator=draw), torch.arange(12) % 3)
    assert cache.logits(torch.randn(2, 8, generator=draw)).shape == (2, 3)
    for features in (torch.zeros(8), torch.zeros(2, 9), torch.zeros(2, 8, dtype=torch.int64), torch.zeros(1, 2, 8)):
        for call in (cache.logits, cache.predict):
            with pytest.raises(DataError, match=r"features are .*; accepted: floats \[B, 8\]"):
                call(features)
    with pytest.raises(DataError, match=r"labels have shape \[1\]"):
        cache.score(torch.zeros(4, 8), torch.zeros(1, dtype=torch.int64))


def test_functions_of_views_refuse_other_shapes() -> None:
    views, logits = torch.zeros(2, 5, 8), torch.zeros(2, 5, 3)
    text = torch.zeros(3, 8)
    calls: list[tuple[Callable[..., Any], str]] = [
        (lambda: mean_shift(views[0], logits), r"views are \[5, 8\]"),
        (lambda: mean_shift(views, logits[:, :4]), r"logits are \[2, 4, 3\].*\[2, 5, C\]"),
        (lambda: vote(logits[0]), r"logits are \[5, 3\].*\[B, V, C\]"),
        (lambda: vote(logits.long()), r"of torch.int64"),
        (lambda: filter_views(logits, views[:1], similarity=0.5, confidence=0.5, generated=0), r"features are \[1, 5"),
        (lambda: summarise(views[:, 0], text, 1.0), r"views are \[2, 8\].*\[B, V, 8\]"),
        (lambda: summarise(views[..., :7], text, 1.0), r"views are \[2, 5, 7\].*\[B, V, 8\]"),
    ]
    for call, message in calls:
        with pytest.raises(DataError, match=message):
            call()
