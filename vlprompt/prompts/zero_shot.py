"""Frozen text features for objectives and zero-shot classifiers, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.errors import ConfigError
from vlprompt.prompts.context import template_layout, text_layout
from vlprompt.prompts.words import words_of

_PROMPTS = 256  # encoded at once


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
        templates: Prompts with ``{}`` for the name. They are encoded one at a time to limit memory.
        average: ``unit`` normalises every template's feature before averaging (CoOp's ensemble), ``raw`` averages raw
            features (PromptSRC). Both normalise the average.
    """
    if backbone.device.type == "meta":  # a backbone without weights, to count trainable parameters
        return torch.empty(len(class_names), backbone.embed_dim, device="meta")
    total: Tensor | None = None
    autocast = torch.autocast(backbone.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:  # no inference tensors: training may use the result
        for template in templates:
            features = backbone.text.encode(template_layout(backbone.text, class_names, [template]))[0]
            features = F.normalize(features, dim=-1) if average == "unit" else features
            total = features if total is None else total + features
        assert total is not None
        return F.normalize(total / len(templates), dim=-1)


def raw_template_features(backbone: Any, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the mean of each class's raw features ``[C, D]`` over hand-written templates, without gradient.

    It is not normalised, and its length determines the relative weight of residuals added to it.
    """
    if backbone.device.type == "meta":
        return torch.empty(len(class_names), backbone.embed_dim, device="meta")
    return mean_features(backbone, filled_in(class_names, templates))


def raw_features(backbone: Any, prompts: Sequence[str]) -> Tensor:
    """Return the raw text features ``[P, D]`` of whole prompts, without gradient."""
    autocast = torch.autocast(backbone.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        chunks = [list(prompts[start : start + _PROMPTS]) for start in range(0, len(prompts), _PROMPTS)]
        return torch.cat([backbone.text.encode(text_layout(backbone.text, chunk))[0] for chunk in chunks])


def mean_features(backbone: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return the mean raw feature ``[C, D]`` of each class's prompts, not normalised.

    Raises:
        ConfigError: A class without prompts.
    """
    if empty := [row for row, texts in enumerate(prompts) if not texts]:
        raise ConfigError(f"class {empty[0]} has no prompts; accepted: 1 or more for each class")
    features = raw_features(backbone, [prompt for texts in prompts for prompt in texts])
    return torch.stack([chunk.mean(dim=0) for chunk in features.split([len(texts) for texts in prompts])])


def filled_in(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return the prompts of each class: every template with the class name."""
    return [[template.replace("{}", words_of(name)) for template in templates] for name in class_names]
