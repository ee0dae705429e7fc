"""Only class names lose their underscores: captions, templates and other texts are encoded as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlprompt.backbone import Backbone
from vlprompt.errors import ClassNameError
from vlprompt.meta.tasks import fit_captions
from vlprompt.prompts import template_layout, text_layout
from vlprompt.prompts.zero_shot import mean_features, raw_features, raw_template_features, template_features

TEXTS = ["the file_name on a screen", "a  snake_case_word", "plain"]


def encoded(backbone: Backbone, text: str) -> torch.Tensor:
    """The feature of one text by open_clip's own tokens."""
    tokens = torch.tensor([backbone.text.tokens(text)])
    padded = torch.nn.functional.pad(tokens, (0, backbone.text.context_length - tokens.shape[1]))
    model: Any = backbone.model
    with torch.no_grad():
        return model.encode_text(padded)[0]


def tokens_of(layout: Any, row: int) -> list[int]:
    return layout.slots[0, row, : layout.lengths[0, row]].tolist()


def test_the_layout_of_texts_has_their_own_tokens(tiny_backbone: Backbone) -> None:
    layout = text_layout(tiny_backbone.text, TEXTS)
    assert (layout.groups, layout.classes, layout.context_length) == (1, len(TEXTS), 0)
    for row, text in enumerate(TEXTS):
        assert tokens_of(layout, row) == tiny_backbone.text.tokens(text)


def test_texts_that_are_too_long_are_listed(tiny_backbone: Backbone) -> None:
    with pytest.raises(ClassNameError, match="1 of 2 .*77 tokens"):
        text_layout(tiny_backbone.text, ["a", "long " * 80])


def test_features_of_texts_are_open_clips(tiny_backbone: Backbone) -> None:
    expected = torch.stack([encoded(tiny_backbone, text) for text in TEXTS])
    torch.testing.assert_close(raw_features(tiny_backbone, TEXTS), expected)
    torch.testing.assert_close(mean_features(tiny_backbone, [TEXTS[:2]])[0], expected[:2].mean(dim=0))
    assert not torch.allclose(expected[0], encoded(tiny_backbone, TEXTS[0].replace("_", " ")))


def test_of_a_template_only_the_name_loses_its_underscores(tiny_backbone: Backbone) -> None:
    template, text = "snake_case {}.", "snake_case sea lake."
    expected = encoded(tiny_backbone, text)
    torch.testing.assert_close(raw_template_features(tiny_backbone, ["sea_lake"], [template])[0], expected)
    unit = template_features(tiny_backbone, ["sea_lake"], [template])[0]
    torch.testing.assert_close(unit, expected / expected.norm())
    layout = template_layout(tiny_backbone.text, ["sea_lake"], [template])
    assert tokens_of(layout, 0) == tiny_backbone.text.tokens(text)


def test_captions_keep_them_until_they_are_class_names(tiny_backbone: Backbone) -> None:
    from vlprompt.runs.meta_run import _encoded

    assert fit_captions(tiny_backbone.text, TEXTS, 20) == ["the file_name on a screen", "a snake_case_word", "plain"]
    torch.testing.assert_close(_encoded(tiny_backbone, TEXTS[:1])[0], encoded(tiny_backbone, TEXTS[0]))
