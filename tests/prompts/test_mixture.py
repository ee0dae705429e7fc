"""Contexts of experts: how the official rule and the token rule count, and what they start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlprompt.backbone import Backbone
from vlprompt.prompts import ExpertContexts, TunedLayerNorms, template_layout

TEMPLATES = [
    "a photo of a {}",
    "a low resolution photo of the {}",
    "a photo of a {}, a type of aircraft",
    "a {} in a video game",
    "{} texture",
    "a photo of a  {}",
    "a high-performance {}",
    "{}",
]
NAMES = ["golden_retriever", "jack-o'-lantern", "pizza"]


@pytest.fixture(scope="module")
def text(tiny_backbone: Backbone) -> Any:
    return tiny_backbone.text


def test_the_official_rule_counts_by_spaces(text: Any) -> None:
    experts = ExpertContexts(text, TEMPLATES, "words")
    assert experts.lengths == [(4, 0), (6, 0), (4, 5), (1, 5), (0, 2), (5, 0), (2, 0), (0, 0)]


def test_the_token_rule_counts_tokens(text: Any) -> None:
    experts = ExpertContexts(text, TEMPLATES, "tokens")
    assert experts.lengths == [(4, 0), (6, 0), (4, 5), (1, 4), (0, 1), (4, 0), (4, 0), (0, 0)]


@pytest.mark.parametrize("period", [False, True])
def test_token_counting_starts_as_plain_clip_with_the_template(text: Any, period: bool) -> None:
    experts = ExpertContexts(text, TEMPLATES, "tokens")
    features = text.encode(experts.layout(text, NAMES, period=period), experts.vectors())
    plain = [template + ("." if period else "") for template in TEMPLATES]
    torch.testing.assert_close(features, text.encode(template_layout(text, NAMES, plain)), rtol=1e-4, atol=1e-4)


def test_token_counting_leaves_name_period_and_end_of_text_alone(text: Any) -> None:
    experts = ExpertContexts(text, TEMPLATES, "tokens")
    layout = experts.layout(text, NAMES, period=True)
    for g in range(len(TEMPLATES)):
        for c, name in enumerate(NAMES):
            row = layout.slots[g, c, : layout.lengths[g, c]].tolist()
            words = text.tokens(name.replace("_", " "))[1:-1]
            before = experts.lengths[g][0]
            assert row[1 + before : 1 + before + len(words)] == words
            assert row[-2:] == text.tokens(".")[-2:]


def test_official_counting_starts_as_plain_clip_but_for_the_doubled_space(text: Any) -> None:
    experts = ExpertContexts(text, TEMPLATES, "words")
    features = text.encode(experts.layout(text, NAMES, period=False), experts.vectors())
    plain = text.encode(template_layout(text, NAMES, TEMPLATES))
    same = [torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(features, plain, strict=True)]
    assert same == [template != "a photo of a  {}" for template in TEMPLATES]


def test_the_doubled_space_claims_the_first_token_of_the_name(text: Any) -> None:
    # As with the official code on Food101 (moe.py 161, 211): nothing is left of "pizza".
    layout = ExpertContexts(text, ["a photo of a  {}"], "words").layout(text, ["pizza"], period=True)
    assert layout.slots[0, 0].tolist() == [49406, -1, -2, -3, -4, -5, *text.tokens(".")[1:]]


def test_text_behind_the_name_claims_end_of_text_without_a_period(text: Any) -> None:
    # As with the official code (moe.py 157-179): the pooled token of " in a video game" is learned.
    experts = ExpertContexts(text, ["a {} in a video game"], "words")
    assert experts.layout(text, ["cat"], period=False).slots[0, 0, -1] == -6
    assert torch.equal(experts.after[0][-1], text.embed([49407])[0])


def test_vectors_are_padded_with_zeros_and_pass_gradients_to_their_own_part(text: Any) -> None:
    experts = ExpertContexts(text, ["a photo of a {}", "{} texture"], "tokens")
    vectors = experts.vectors()
    assert vectors.shape == (2, 4, text.width)
    assert torch.equal(vectors[0], experts.before[0]) and torch.equal(vectors[1, :1], experts.after[1])
    assert not vectors[1, 1:].any()
    vectors[1].sum().backward()
    assert torch.equal(experts.after[1].grad, torch.ones(1, text.width))
    assert not experts.before[0].grad.any()


def test_tuned_layer_norms_are_copies_by_their_open_clip_names(tiny_backbone: Backbone) -> None:
    norms = TunedLayerNorms(tiny_backbone.image)
    own = dict(tiny_backbone.model.visual.named_parameters())
    assert len(norms.names) == 4 * 2 * 2  # layers, norms, weight and bias
    for name, value in norms.overrides().items():
        assert torch.equal(value, own[name]) and value.requires_grad
        assert value.data_ptr() != own[name].data_ptr()
