"""Frozen text features for objectives and zero-shot classifiers, computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbone import TextTower, TokenLayout
from vlprompt.backbone.layout import check_row_lengths
from vlprompt.config.texts import sentences_of, weighted
from vlprompt.config.types import Texts
from vlprompt.errors import ConfigError
from vlprompt.prompts.context import template_layout, text_layout
from vlprompt.prompts.words import words_of

_PROMPTS = 256  # encoded at once
Average = Literal["unit", "raw", "scores"]
"""What is averaged over the texts of a class."""


def template_features(
    backbone: Any,
    class_names: Sequence[str],
    templates: Sequence[Texts],
    average: Average = "unit",
) -> Tensor:
    """Return features ``[C, D]`` of hand-written templates and sentences, without gradient.

    Args:
        backbone: The frozen CLIP.
        class_names: C names.
        templates: Templates with ``{}`` for the name, and sentences by class, both with their weights, if any
            (:mod:`vlprompt.config.texts`). Templates are encoded one at a time to limit memory.
        average: ``unit`` normalises every feature before averaging (CoOp's ensemble), ``raw`` averages raw features
            (PromptSRC). Both normalise the average. ``scores`` averages unit features and leaves their mean as it is:
            its cosines with an image are the means of the texts' cosines (DCLIP).

    Raises:
        ConfigError: A class has no sentences.
        ClassNameError: A prompt is too long for the text tower.
    """
    with _without_gradient(backbone):
        mean = _mean(backbone, class_names, templates, unit=average != "raw")
        return mean if average == "scores" else F.normalize(mean, dim=-1)


def group_features(
    backbone: Any, class_names: Sequence[str], templates: Sequence[Texts], groups: Sequence[int]
) -> Tensor:
    """Return the unit features ``[G, C, D]`` of consecutive groups of templates, each as :func:`template_features`.

    Args:
        backbone: The frozen CLIP.
        class_names: C names.
        templates: Templates and sentences, in the order of the groups.
        groups: Sizes of the groups; they add up to the number of templates.
    """
    parts, rest = [], list(templates)
    for size in groups:
        parts.append(template_features(backbone, class_names, rest[:size]))
        rest = rest[size:]
    with _without_gradient(backbone):
        return torch.stack(parts)


def raw_template_features(backbone: Any, class_names: Sequence[str], templates: Sequence[Texts]) -> Tensor:
    """Return the mean of each class's raw features ``[C, D]`` over templates and sentences, without gradient.

    It is not normalised, and its length determines the relative weight of residuals added to it. Arguments and errors
    are those of :func:`template_features`.
    """
    with _without_gradient(backbone):
        return _mean(backbone, class_names, templates, unit=False)


@contextlib.contextmanager
def _without_gradient(backbone: Any) -> Iterator[None]:
    """Compute in full precision and without gradient, but no inference tensors: training may use the result."""
    kind = backbone.device.type
    autocast = torch.autocast("cpu" if kind == "meta" else kind, enabled=False)  # meta tensors have no autocast
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def _mean(backbone: Any, class_names: Sequence[str], templates: Sequence[Texts], *, unit: bool) -> Tensor:
    """Return the weighted mean ``[C, D]`` of raw or unit features."""
    if backbone.device.type == "meta":  # a backbone without weights, to count trainable parameters
        return torch.empty(len(class_names), backbone.embed_dim, device="meta")
    total: Any = 0.0
    weights: Any = 0.0
    for entry in templates:
        body, weight = weighted(entry)
        if isinstance(body, str):
            features = backbone.text.encode(template_layout(backbone.text, class_names, [body]))[0]
            features = F.normalize(features, dim=-1) if unit else features
            counts: Tensor | float = 1.0
        else:
            features, counts = _sums(backbone, class_names, body, unit)
        total = total + (features if weight is None else weight * features / counts)
        weights = weights + (counts if weight is None else weight)
    mean: Tensor = total / weights
    return mean


def _sums(backbone: Any, class_names: Sequence[str], body: Any, unit: bool) -> tuple[Tensor, Tensor]:
    """Return the weighted sums ``[C, D]`` of the features of each class's sentences, and the weights' sums ``[C, 1]``.

    Classes may have different numbers of sentences.
    """
    rows = sentences_of(body, class_names)
    prompts = [with_name(sentence, name) for name, row in zip(class_names, rows, strict=True) for sentence, _ in row]
    features = raw_features(backbone, prompts)
    features = F.normalize(features, dim=-1) if unit else features
    weights = features.new_tensor([weight for row in rows for _, weight in row])[:, None]
    sizes = [len(row) for row in rows]
    sums = torch.stack([chunk.sum(dim=0) for chunk in (weights * features).split(sizes)])
    return sums, torch.stack([chunk.sum(dim=0) for chunk in weights.split(sizes)])


def first_texts(templates: Sequence[Texts]) -> list[Texts]:
    """Return the first template, or the first sentence of each class, as a list of texts."""
    body, _ = weighted(templates[0])
    return [body if isinstance(body, str) else {name: sentences[:1] for name, sentences in body.items()}]


def first_layout(tower: TextTower, class_names: Sequence[str], templates: Sequence[Texts]) -> TokenLayout:
    """Return the layout of one prompt per class: the first template, or the first sentence of each class.

    Raises:
        ConfigError: A class has no sentences.
        ClassNameError: A prompt is too long for the text tower.
    """
    body, _ = weighted(templates[0])
    if isinstance(body, str):
        return template_layout(tower, class_names, [body])
    firsts = [row[0][0] for row in sentences_of(body, class_names)]
    rows = [tower.tokens(with_name(text, name)) for text, name in zip(firsts, class_names, strict=True)]
    check_row_lengths(class_names, [len(row) for row in rows], tower.context_length, "the first sentence")
    return TokenLayout.from_rows([rows])


def plain_template(entry: Texts, key: str) -> str:
    """Return the template of an entry whose words are used before they are encoded.

    Raises:
        ConfigError: The entry holds sentences of classes.
    """
    body, _ = weighted(entry)
    if isinstance(body, str):
        return body
    raise ConfigError(f"{key} has sentences of classes where the words of a template are needed; accepted: a template")


def raw_features(backbone: Any, prompts: Sequence[str]) -> Tensor:
    """Return the raw text features ``[P, D]`` of whole prompts, without gradient."""
    with _without_gradient(backbone):
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


def with_name(text: str, name: str) -> str:
    """Return a template or sentence with the class name in place of ``{}``."""
    return text.replace("{}", words_of(name))


def filled_in(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return the prompts of each class: every template with the class name."""
    return [[with_name(template, name) for template in templates] for name in class_names]
