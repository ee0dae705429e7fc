"""Frozen text features that objectives compare with and classifiers are made of; computed once, never per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.errors import ConfigError
from vlprompt.prompts.context import template_layout, text_layout
from vlprompt.prompts.words import words_of

_PROMPTS = 256  # encoded at a time


def template_features(
    backbone: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    average: Literal["unit", "raw"] = "unit",
) -> Tensor:
    """Return unit features ``[C, D]`` of hand-written templates, without gradient.

    Args:
        backbone: The frozen CLIP.
        class_names: C names.
        templates: Prompts with ``{}`` for the name; each is encoded by itself, so that memory stays that of one.
        average: ``unit`` normalises every template's feature before averaging (CoOp's ensemble), ``raw`` averages them
            as they are (PromptSRC). Both normalise the average.
    """
    if backbone.device.type == "meta":  # a backbone that has shapes only, to count learnables
        return torch.empty(len(class_names), backbone.embed_dim, device="meta")
    total: Tensor | None = None
    autocast = torch.autocast(backbone.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:  # kept for training, whoever asks first
        for template in templates:
            own = backbone.text.encode(template_layout(backbone.text, class_names, [template]))[0]
            own = F.normalize(own, dim=-1) if average == "unit" else own
            total = own if total is None else total + own
        assert total is not None
        return F.normalize(total / len(templates), dim=-1)


def raw_template_features(backbone: Any, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the mean of each class's raw features ``[C, D]`` over hand-written templates, without gradient.

    Its length is not 1: what is added to it counts by that.
    """
    if backbone.device.type == "meta":
        return torch.empty(len(class_names), backbone.embed_dim, device="meta")
    return mean_features(backbone, filled_in(class_names, templates))


def raw_features(backbone: Any, prompts: Sequence[str]) -> Tensor:
    """Return the raw text features ``[P, D]`` of whole prompts, without gradient."""
    autocast = torch.autocast(backbone.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        parts = [list(prompts[start : start + _PROMPTS]) for start in range(0, len(prompts), _PROMPTS)]
        return torch.cat([backbone.text.encode(text_layout(backbone.text, part))[0] for part in parts])


def mean_features(backbone: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return the mean raw feature ``[C, D]`` of each class's own prompts, not normalised.

    Raises:
        ConfigError: A class without prompts.
    """
    if empty := [row for row, own in enumerate(prompts) if not own]:
        raise ConfigError(f"class {empty[0]} has no prompts; accepted: 1 or more for each class")
    features = raw_features(backbone, [prompt for own in prompts for prompt in own])
    return torch.stack([part.mean(dim=0) for part in features.split([len(own) for own in prompts])])


def filled_in(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return every template with each class's name in it, as they stand in prompts."""
    return [[template.replace("{}", words_of(name)) for template in templates] for name in class_names]
