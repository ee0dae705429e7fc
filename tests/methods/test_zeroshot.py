"""Zero-shot CLIP: open_clip's own formula, the ensemble's two normalisations, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.errors import ConfigError
from vlprompt.methods.zeroshot import ZeroShotSettings

NAMES = ["golden_retriever", "jack-o'-lantern", "cat"]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> torch.Tensor:
    return torch.from_numpy(tiny_clip.draw_images("zero-shot", 4, 64))


def open_clips_weights(backbone: Backbone, templates: list[str]) -> torch.Tensor:
    """The zero-shot classifier ``[C, D]`` as open_clip builds it."""
    rows = []
    for name in NAMES:
        ids = backbone.text.tokenizer([template.format(name.replace("_", " ")) for template in templates])
        rows.append(F.normalize(F.normalize(backbone.model.encode_text(ids), dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["{}", "itap of {}", "a {} in a video game."]])
def test_weights_and_logits_are_open_clips(tiny_backbone: Backbone, images: torch.Tensor, templates: list[str]) -> None:
    method = create_method("zeroshot", tiny_backbone, NAMES, templates=templates)
    weights = open_clips_weights(tiny_backbone, templates)
    torch.testing.assert_close(method.text_features(), weights, rtol=1e-5, atol=1e-5)
    features = F.normalize(tiny_backbone.model.encode_image(images), dim=-1)
    expected = tiny_backbone.model.logit_scale.exp() * features @ weights.t()
    torch.testing.assert_close(method(images), expected, rtol=1e-4, atol=1e-4)


def test_single_template_is_the_models_own_forward(tiny_backbone: Backbone, images: torch.Tensor) -> None:
    ids = tiny_backbone.text.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    image, text, scale = tiny_backbone.model(images, ids)
    method = create_method("zeroshot", tiny_backbone, NAMES)
    torch.testing.assert_close(method(images), scale * image @ text.t(), rtol=1e-4, atol=1e-4)


def test_ensemble_puts_seven_selected_templates_in_front(tiny_backbone: Backbone) -> None:
    own = ["a centered satellite photo of {}."]
    ensemble = create_method("zeroshot", tiny_backbone, NAMES, templates=own, ensemble=True)
    assert len(ENSEMBLES["selected"]) == 7
    expected = open_clips_weights(tiny_backbone, [*ENSEMBLES["selected"], *own])
    torch.testing.assert_close(ensemble.text_features(), expected, rtol=1e-5, atol=1e-5)


def test_a_second_ensemble_is_the_same_as_the_first(tiny_backbone: Backbone) -> None:
    # The official code extends a list on its class (CoOp: trainers/zsclip.py).
    first = create_method("zeroshot", tiny_backbone, NAMES, ensemble=True).text_features()
    assert torch.equal(create_method("zeroshot", tiny_backbone, NAMES, ensemble=True).text_features(), first)


def test_there_is_nothing_to_train(tiny_backbone: Backbone) -> None:
    method = create_method("zeroshot", tiny_backbone, NAMES)
    assert method.parameter_groups(0.1) == [] and method.trained_state() == {}
    assert not method.text_features().requires_grad
    method.load_trained_state({})


@pytest.mark.parametrize(
    "own",
    [
        {"templates": "a photo of a {}."},
        {"templates": ["a photo"]},
        {"templates": ["{} or {}"]},
        {"templates": [3]},
        {"templates": None},
        {"ensemble": "yes"},
        {"ensemble": 1},
        {"template": ["{}"]},
    ],
    ids=repr,
)
def test_malformed_settings_are_config_errors(tiny_backbone: Backbone, own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_method("zeroshot", tiny_backbone, NAMES, **own)
    assert next(iter(own)) in str(caught.value)


@pytest.mark.parametrize("templates", [["{}"], ("a photo of a {}.", "{} texture"), ["{{}}"]])
def test_templates_with_one_place_are_accepted(templates: Any) -> None:
    assert ZeroShotSettings(templates=templates).templates == tuple(templates)
