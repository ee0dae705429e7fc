"""Frozen text features that objectives compare with; computed once, never per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.prompts.context import template_layout


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
