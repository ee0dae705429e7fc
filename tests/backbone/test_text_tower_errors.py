"""Refusals of the text tower: context, deep context and rows that do not match each other or the tower."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vlprompt.backbone import Backbone
from vlprompt.backbone.layout import TokenLayout
from vlprompt.errors import BackboneError
from vlprompt.prompts import ExpertContexts, context_layout, template_layout


@pytest.fixture(scope="module")
def text(tiny_backbone: Backbone) -> Any:
    return tiny_backbone.text


@pytest.mark.parametrize(
    ("shape", "specific"),
    [
        ((1, 2, 64), False),  # width
        ((1, 1, 128), False),  # too few vectors
        ((128,), False),
        ((2, 128, 1, 1), False),
        ((0, 2, 128), False),
        ((1, 2, 128), True),  # class-specific needs a class axis
        ((1, 3, 2, 128), True),  # three classes, the layout has two
        ((3, 2, 128), True),
    ],
)
def test_context_of_a_wrong_shape_is_refused_with_both_shapes(
    text: Any, shape: tuple[int, ...], specific: bool
) -> None:
    layout = context_layout(text, ["cat", "dog"], "X X", 2, "end", class_specific=specific)
    with pytest.raises(BackboneError, match="context has shape") as caught:
        text.encode(layout, torch.zeros(shape))
    assert str(list(shape)) in str(caught.value) and "W=128" in str(caught.value)


def test_mismatched_numbers_of_groups_are_refused(text: Any) -> None:
    pair = ExpertContexts(text, ["a photo of a {}", "itap of {}"]).layout(text, ["cat", "dog"], period=False)
    with pytest.raises(BackboneError, match="G=2"):
        text.encode(pair, torch.zeros(3, 4, text.width))
    with pytest.raises(BackboneError, match="G=2"):
        text.encode(pair, torch.zeros(4, text.width))
    single = context_layout(text, ["cat", "dog"], "X X", 2, "end")
    with pytest.raises(BackboneError, match="deep context of layer 1 has shape"):
        text.encode(single, torch.zeros(3, 2, text.width), {1: torch.zeros(2, 2, text.width)})


def test_context_is_required_exactly_for_layouts_with_context_slots(text: Any) -> None:
    layout = context_layout(text, ["cat"], "X X", 2, "end")
    with pytest.raises(BackboneError, match="2 context slots but no context was given"):
        text.encode(layout)
    frozen = template_layout(text, ["cat"], ["a {}"])
    with pytest.raises(BackboneError, match="has no slots for it"):
        text.encode(frozen, torch.zeros(2, text.width))
    with pytest.raises(BackboneError, match="no context slots to overwrite"):
        text.encode(frozen, deep={1: torch.zeros(2, text.width)})
    assert text.encode(frozen, torch.zeros(1, 0, text.width)).shape == (1, 1, 64)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_deep_context_outside_the_layers_is_refused(text: Any, layer: int) -> None:
    layout = context_layout(text, ["cat"], "X", 1, "end")
    with pytest.raises(BackboneError, match=f"layer {layer}; accepted: 1 to 3"):
        text.encode(layout, torch.zeros(1, text.width), {layer: torch.zeros(1, text.width)})


@pytest.mark.parametrize("algorithm", ["packed", "cut", "padded"])
def test_rows_longer_than_the_tower_are_refused(text: Any, algorithm: Any) -> None:
    layout = TokenLayout.from_rows([[[49406, *[5] * 76, 49407]]])
    with pytest.raises(BackboneError, match="78 slots; this text tower takes 77"):
        text.encode(layout, algorithm=algorithm)


def test_a_tower_without_a_causal_mask_uses_only_the_padded_path(tiny_backbone: Backbone) -> None:
    model = copy.deepcopy(tiny_backbone.model)
    model.attn_mask = None
    text = type(tiny_backbone.text)(model, tiny_backbone.text.tokenizer)
    assert not text.causal and text.algorithm == "padded"
    layout = context_layout(text, ["cat", "dog"], "X", 1, "end")
    assert text.encode(layout, torch.full((1, text.width), 0.1)).shape == (1, 2, 64)
    for algorithm in ("packed", "cut"):
        with pytest.raises(BackboneError, match="use 'padded'"):
            text.encode(layout, torch.full((1, text.width), 0.1), algorithm=algorithm)
