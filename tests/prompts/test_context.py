"""Text context: where its vectors stand, and what they start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlprompt.backbone import Backbone
from vlprompt.errors import ClassNameError, ConfigError
from vlprompt.prompts import CONTEXT_STD, TextContext, context_layout, template_layout

SOT, EOT, PERIOD = 49406, 49407, 269


@pytest.fixture(scope="module")
def text(tiny_backbone: Backbone) -> Any:
    return tiny_backbone.text


def row(layout: Any, c: int, g: int = 0) -> list[int]:
    return layout.slots[g, c, : layout.lengths[g, c]].tolist()


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("end", [SOT, -1, -2, -3, "n", "n", PERIOD, EOT]),
        ("middle", [SOT, -1, "n", "n", -2, -3, PERIOD, EOT]),  # the longer half behind the name
        ("front", [SOT, "n", "n", -1, -2, -3, PERIOD, EOT]),
    ],
)
def test_slots_stand_before_around_or_behind_the_name(text: Any, position: Any, expected: list[Any]) -> None:
    name = iter(text.tokens("sea lake")[1:-1])
    layout = context_layout(text, ["sea_lake", "cat"], "X X X", 3, position)
    assert row(layout, 0) == [next(name) if slot == "n" else slot for slot in expected]
    assert len(row(layout, 1)) == len(expected) - 1


def test_generic_context_in_front_is_shared_and_a_name_in_front_is_not(text: Any) -> None:
    names = ["cat", "dog"]
    assert context_layout(text, names, "X X X", 3, "end").prefix_lengths() == [4]
    assert context_layout(text, names, "X X X", 3, "middle").prefix_lengths() == [2]
    assert context_layout(text, names, "X X X", 3, "front").prefix_lengths() == [1]
    assert context_layout(text, names, "X X X", 3, "end", class_specific=True).prefix_lengths() == [1]


def test_words_of_more_tokens_than_vectors_leave_tokens_in_front_of_the_name(text: Any) -> None:
    # CoOp counts words by spaces (trainers/coop.py 72-110): "close-up" is three tokens and one vector.
    layout = context_layout(text, ["cat"], "close-up", 1, "end")
    tokens = text.tokens("close-up cat.")
    assert row(layout, 0) == [tokens[0], -1, *tokens[2:]]


def test_templates_hold_no_slots_and_one_group_each(text: Any) -> None:
    layout = template_layout(text, ["sea_lake"], ["a photo of a {}.", "{} texture"])
    assert (layout.groups, layout.classes, layout.context_length) == (2, 1, 0)
    assert row(layout, 0, 0) == text.tokens("a photo of a sea lake.")
    assert row(layout, 0, 1) == text.tokens("sea lake texture")


def test_random_context_has_the_published_deviation_and_the_generators_seed(text: Any) -> None:
    torch.manual_seed(3)
    first = TextContext(text, 64)
    torch.manual_seed(3)
    assert torch.equal(first.ctx, TextContext(text, 64).ctx)
    assert first.ctx.shape == (64, text.width) and first.ctx.dtype == torch.float32
    assert float(first.ctx.detach().std()) == pytest.approx(CONTEXT_STD, rel=0.05)
    assert abs(float(first.ctx.detach().mean())) < 1e-3


def test_class_specific_context_has_a_set_per_class(text: Any) -> None:
    context = TextContext(text, 4, classes=3)
    assert context.ctx.shape == (3, 4, text.width) and context.class_specific
    assert context.layout(text, ["a", "b", "c"], "end").class_specific


def test_words_set_length_and_start_and_make_context_generic(text: Any) -> None:
    context = TextContext(text, 16, "a_photo of a", classes=5)
    assert context.length == 4 and not context.class_specific
    assert torch.equal(context.ctx, text.embed(text.tokens("a photo of a")[1:-1]))
    assert context.placeholder == "a photo of a"


@pytest.mark.parametrize("words", ["a  photo", " a photo", "a photo ", " "])
def test_words_with_odd_spaces_are_refused(text: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="parted by single spaces"):
        TextContext(text, 4, words)


def test_context_that_leaves_no_room_for_a_name_is_refused(text: Any) -> None:
    assert context_layout(text, ["x"], " ".join(["X"] * 73), 73, "end").lengths.item() == 77
    with pytest.raises(ClassNameError, match="fewer context tokens"):
        context_layout(text, ["x"], " ".join(["X"] * 74), 74, "end")
