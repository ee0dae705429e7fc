"""Trained methods move to classes for which the sentences of an objective have no entry; training there is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.config.types import field_hints
from vlprompt.errors import ConfigError
from vlprompt.objectives import get_objective_class, list_objectives

OLD, NEW = ["cat", "dog"], ["oak", "elm"]
SENTENCES = {name: [f"a {name} with a tail."] for name in OLD}
WITH_TEXTS = [name for name in list_objectives() if "templates" in field_hints(get_objective_class(name).Settings)]
OWN: dict[str, dict[str, Any]] = {"grouped_text": {"groups": [1]}, "shift_consistency": {"variant": "paper"}}


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_a_trained_method_moves_to_classes_without_sentences(tiny_backbone: Backbone, name: str) -> None:
    objectives = {name: {"templates": [SENTENCES], **OWN.get(name, {})}}
    method = create_method("ivlp", tiny_backbone, OLD, image_depth=1, text_depth=1, objectives=objectives)
    moved = method.with_classes(NEW)
    assert moved.moved and not method.moved and moved.text_features().shape[0] == 2
    features = torch.randn(3, 3, 64, 64)
    assert torch.equal(moved.eval()(features), create_like(method, tiny_backbone).eval()(features))
    with pytest.raises(ConfigError, match=r"2 of 2 classes have no sentences:\n.*'oak'"):
        moved.losses(features, torch.tensor([0, 1, 1]))
    with pytest.raises(ConfigError, match="2 of 2 classes have no sentences"):
        create_method("ivlp", tiny_backbone, NEW, image_depth=1, text_depth=1, objectives=objectives)


def create_like(method: Any, backbone: Backbone) -> Any:
    """The method for the new classes, with the same prompts and without objectives."""
    plain = create_method("ivlp", backbone, NEW, **dataclasses.asdict(method.settings))
    state = method.trained_state()
    plain.load_trained_state({key: value for key, value in state.items() if not key.startswith("objectives.")})
    return plain


def test_kgcoop_with_sentences_moves_to_new_classes(tiny_backbone: Backbone) -> None:
    method = create_method("kgcoop", tiny_backbone, OLD, knowledge={"templates": [SENTENCES]})
    assert method.with_classes(NEW).class_names == NEW and method.with_classes(OLD).active[0].lacking is None
