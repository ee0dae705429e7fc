"""Evaluation metrics: accuracies, F1 and calibration for one label per image, ranking and F1 for several labels.

Values are in percent. One label per image: ``accuracy``; ``mean_per_class``, the mean accuracy of the classes with
images; ``top5``, the images with their label among the 5 largest logits (among all if there are fewer classes);
``ece``, the expected calibration error of the softmax probabilities in 15 bins of equal width, each open below and
closed above (Guo et al., ICML 2017; arXiv 1706.04599, eq. 3); and ``precision``, ``recall`` and ``f1``, the macro
averages of torchmetrics: means over the classes that are the label or the answer of an image, where a class that is
never the answer has precision 0.

Several labels per image: ``map`` is the mean area under the classes' precision-recall curves. ``map_11point`` is the
mean of VOC2007's 11-point average precision, the best precision at recall 0, 0.1, ... 1. Both means skip classes
without a positive image. ``cp``, ``cr`` and ``cf1`` are the mean precision, recall and F1 of the classes and ``of1``
the F1 of all decisions together; a label is assigned if its probability is above 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassStatScores
from torchmetrics.functional.classification import (
    binary_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from vlprompt.errors import ConfigError, NotFiniteError, did_you_mean

MULTICLASS: Mapping[str, str] = {"accuracy": "accuracy", "mean_per_class": "mean per-class accuracy"}
MULTILABEL: Mapping[str, str] = {"map": "mAP", "map_11point": "11-point mAP"}
HEADLINES: Mapping[str, str] = {**MULTICLASS, **MULTILABEL}
"""Headline metrics accepted in cards, with their names in tables."""
OF_ONE_LABEL: Mapping[str, str] = {
    **MULTICLASS,
    "top5": "top-5 accuracy",
    "ece": "expected calibration error",
    "precision": "macro precision",
    "recall": "macro recall",
    "f1": "macro F1",
}
OF_SEVERAL_LABELS: Mapping[str, str] = {**MULTILABEL, "cp": "CP", "cr": "CR", "cf1": "CF1", "of1": "OF1"}
METRICS: Mapping[str, str] = {**OF_ONE_LABEL, **OF_SEVERAL_LABELS}
"""All metrics in results, with their names in tables."""
ERRORS = ("ece",)
"""Metrics of which smaller values are better."""
F1_THRESHOLD = 0.8
RECALL_LEVELS = 11
TOP = 5
BINS = 15


def metric_of(task: Any) -> str:
    """Return the headline metric of a task.

    Raises:
        ConfigError: The metric is unknown or does not match the task's kind of labels.
    """
    several = bool(getattr(task, "multilabel", False))
    # Read by name: a task without these attributes has one label per image and is scored by accuracy.
    name: str = getattr(task, "metric", "map" if several else "accuracy")
    accepted = MULTILABEL if several else MULTICLASS
    if name not in accepted:
        kind = "several labels" if several else "one label"
        raise ConfigError(
            f"{task.name} has {kind} per image and the metric {name!r}; accepted: {' or '.join(accepted)}. "
            "Correct 'metric' in its card."
        )
    return name


def headline(score: Mapping[str, Any]) -> float:
    """Return the headline value of ``score``: the value of its ``metric``, or accuracy without one."""
    return measured(score, None)


def measured(score: Mapping[str, Any], metric: str | None) -> float:
    """Return the value of ``metric`` in ``score``; None for its headline metric.

    Raises:
        ConfigError: ``score`` has no such value, for example because an earlier version measured it.
    """
    name = score.get("metric", "accuracy") if metric is None else metric
    if name not in score:
        raise ConfigError(
            f"a result holds {', '.join(key for key in METRICS if key in score)} and no {name!r}, which the version "
            "that wrote it did not measure; run it again with --force"
        )
    return float(score[name])


def check_metrics(metrics: Sequence[str], multilabel: Mapping[str, bool]) -> None:
    """Raise ConfigError if ``metrics`` has unknown names, or metrics that do not fit the labels of a data set.

    Args:
        metrics: Names of :data:`METRICS`.
        multilabel: Whether images have several labels, by data set.
    """
    problems = [f"{name!r} is no metric.{did_you_mean(name, METRICS)}" for name in metrics if name not in METRICS]
    problems += [f"{name!r} is named twice." for name in dict.fromkeys(metrics) if metrics.count(name) > 1]
    for data, several in multilabel.items():
        fitting = OF_SEVERAL_LABELS if several else OF_ONE_LABEL
        if wrong := [name for name in metrics if name in METRICS and name not in fitting]:
            kind = "several labels" if several else "one label"
            problems.append(f"{data} has {kind} per image and no {', '.join(wrong)}; accepted: {', '.join(fitting)}.")
    if problems:
        raise ConfigError(f"metrics: {' '.join(problems)}")


@dataclass(frozen=True)
class ClassCounts:
    """Numbers of images by class, over all processes.

    Attributes:
        correct: Images of the class with the class as answer, C numbers.
        total: Images of the class.
        answers: Images with the class as answer.
        mistakes: Images by label and another class as answer, those above 0; None with several labels per image.
    """

    correct: list[int]
    total: list[int]
    answers: list[int]
    mistakes: dict[tuple[int, int], int] | None = None

    def scores(self) -> list[dict[str, float] | None]:
        """Return ``precision``, ``recall`` and ``f1`` in percent by class; None for neither an image nor an answer."""
        correct, total, answers = (torch.tensor(counts) for counts in (self.correct, self.total, self.answers))
        values = {name: value.tolist() for name, value in _by_class(correct, total, answers).items()}
        seen = ((total + answers) > 0).tolist()
        return [{name: values[name][row] for name in values} if seen[row] else None for row in range(len(seen))]


def _by_class(correct: Tensor, total: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 in percent, float64 ``[C]``, from counts ``[C]``; 0 for 0 divided by 0."""
    parts = {"precision": (correct, answers), "recall": (correct, total), "f1": (2 * correct, answers + total)}
    return {name: 100 * part.double() / whole.clamp(min=1) for name, (part, whole) in parts.items()}


class MulticlassScores(MulticlassStatScores):
    """Counts of images per class, and calibration, of one label per image; sums over all processes.

    Args:
        classes: C.
    """

    in_top: Tensor
    binned: Tensor
    mistakes: list[Tensor]

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=max(2, classes), average=None)
        self.classes = classes
        self.add_state("in_top", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("binned", torch.zeros(2, BINS, dtype=torch.float64), dist_reduce_fx="sum")
        # A table of C x C images would be large for many classes; the mistakes are at most as many as the images.
        self.add_state("mistakes", default=[], dist_reduce_fx="cat")
        self.sums: dict[str, Tensor] = {}  # of the last score(); they can be added to those of other images

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits ``[B, C]`` and labels ``[B]``."""
        guesses = preds.argmax(dim=-1)
        super().update(guesses, target)
        self.mistakes.append((target * self.classes + guesses)[guesses != target])
        highest = preds.topk(min(TOP, preds.shape[-1]), dim=-1).indices
        self.in_top += (highest == target[:, None]).any(dim=-1).sum()
        confidence = preds.double().softmax(dim=-1).gather(1, guesses[:, None])[:, 0]
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=preds.device)
        bins = torch.bucketize(confidence, edges[1:-1])
        self.binned.index_add_(1, bins, torch.stack([(guesses == target).double(), confidence]))

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return sums over images.

        ``correct``, ``total`` and ``answers`` are int64 ``[C]``, as in :class:`ClassCounts`. ``in_top`` is an int64
        scalar. ``binned`` is float64 ``[2, 15]``, the correct images and the sum of confidences of each bin.
        ``mistakes`` has ``label * C + answer`` of each image with a wrong answer, int64, in any order.
        """
        counts = super().compute()[: self.classes]
        correct, wrong, _, _, total = counts.unbind(dim=1)
        mistakes = torch.cat(list(self.mistakes)) if isinstance(self.mistakes, list) else self.mistakes
        return {
            **{"correct": correct, "total": total, "answers": correct + wrong},
            **{"in_top": self.in_top.clone(), "binned": self.binned.clone(), "mistakes": mistakes},
        }

    def score(self) -> tuple[dict[str, Tensor], ClassCounts]:
        """Return the scores as float64 scalars, and the counts by class."""
        if not self.mistakes:  # a process without images still takes part in the reduction
            self.mistakes.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        self.sums = self.compute()
        for name in ("correct", "total", "answers", "mistakes"):  # torchmetrics makes a single element a scalar
            self.sums[name] = self.sums[name].reshape(-1)
        return values_of(self.sums), counts_of(self.sums)


def pooled(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums over the images of all ``parts``, which are sums over different images."""
    by_name = {name: [sums[name] for sums in parts] for name in parts[0]}
    joined = {"mistakes": torch.cat(by_name.pop("mistakes"))}
    return {name: torch.stack(values).sum(dim=0) for name, values in by_name.items()} | joined


def values_of(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of images with one label from the ``sums`` over them (:meth:`MulticlassScores.compute`)."""
    correct, total, answers = sums["correct"], sums["total"], sums["answers"]
    shown, images = total > 0, total.sum()
    by_class = _by_class(correct, total, answers)
    right, confidence = sums["binned"]
    return {
        "accuracy": 100 * correct.sum().double() / images,
        "correct": correct.sum().double(),
        "total": images.double(),
        "mean_per_class": 100 * (correct[shown].double() / total[shown]).mean(),
        "top5": 100 * sums["in_top"].double() / images,
        "ece": 100 * (right - confidence).abs().sum() / images,
        **{name: value[total + answers > 0].mean() for name, value in by_class.items()},
    }


def counts_of(sums: Mapping[str, Tensor]) -> ClassCounts:
    """Return the counts by class of images with one label from the ``sums`` over them."""
    classes = len(sums["correct"])
    codes, images = (found.tolist() for found in torch.unique(sums["mistakes"], return_counts=True))
    mistakes = {divmod(code, classes): count for code, count in zip(codes, images, strict=True)}
    return ClassCounts(sums["correct"].tolist(), sums["total"].tolist(), sums["answers"].tolist(), mistakes)


class MultilabelScores(Metric):
    """Average precisions and F1 of images with several labels each, over all processes.

    Args:
        classes: C.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits ``[B, C]`` and multi-hot labels ``[B, C]``."""
        self.logits.append(preds.float())
        self.labels.append(target.to(torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics and ``total`` as float64 scalars, and counts by class, int64 ``[C]``."""
        logits, labels = (torch.cat(list(x)) if isinstance(x, list) else x for x in (self.logits, self.labels))
        # Classes without a positive image would make the mean NaN.
        columns = [
            (_ranks(scores), positive)
            for scores, positive in zip(logits.unbind(dim=1), labels.unbind(dim=1), strict=True)
            if positive.any()
        ]
        values = {name: torch.zeros((), dtype=torch.float64, device=logits.device) for name in MULTILABEL}
        if columns:
            values["map"] = torch.stack([binary_average_precision(*column).double() for column in columns]).mean()
            values["map_11point"] = torch.stack([eleven_point(*column) for column in columns]).mean()
        assigned = (logits.sigmoid() > F1_THRESHOLD).long()
        # Without validation, because torchmetrics refuses a single class.
        for name, measure in (("cp", multilabel_precision), ("cr", multilabel_recall), ("cf1", multilabel_f1_score)):
            values[name] = measure(assigned, labels, self.classes, average="macro", validate_args=False).double()
        values["of1"] = multilabel_f1_score(
            assigned, labels, self.classes, average="micro", validate_args=False
        ).double()
        counts = {"correct": (assigned * labels).sum(0), "labels": labels.sum(0), "answers": assigned.sum(0)}
        total = torch.tensor(len(labels), dtype=torch.float64, device=logits.device)
        return {name: 100 * value for name, value in values.items()} | {"total": total} | counts

    def score(self) -> tuple[dict[str, Tensor], ClassCounts]:
        """Return the scores as float64 scalars, and the counts by class."""
        if not self.logits:  # a process without images still takes part in the reduction
            nothing = torch.zeros(0, self.classes, device=self.device)
            self.update(nothing, nothing)
        values = dict(self.compute())
        correct, total, answers = (values.pop(name).reshape(-1).tolist() for name in ("correct", "labels", "answers"))
        return values, ClassCounts(correct, total, answers)


def _ranks(logits: Tensor) -> Tensor:
    """Return float64 values in 0 ... 1 in the order of ``logits`` ``[N]`` of one class, with the same ties.

    Average precision depends only on the order. torchmetrics applies a sigmoid to values outside 0 ... 1; in float32 it
    is exactly 1 for most scaled cosines.
    """
    ranks: Tensor = torch.unique(logits, return_inverse=True)[1]
    return ranks.double() / len(logits)


def eleven_point(ranks: Tensor, positive: Tensor) -> Tensor:
    """Return VOC2007's interpolated average precision of one class, in 0 ... 1.

    It is the mean over recall r = 0, 0.1, ... 1 of the best precision at any threshold with recall r or more. Images of
    equal score share a threshold, so their order does not matter.

    Args:
        ranks: Scores ``[N]``; larger means more likely positive.
        positive: ``[N]``, 1 for positive images, else 0; at least one 1.
    """
    order = ranks.argsort(descending=True)
    ordered = ranks[order]
    hits = positive[order].cumsum(dim=0)
    seen = torch.arange(1, len(ranks) + 1, device=ranks.device)
    last_of_tie = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=ranks.device)])
    hits, seen = hits[last_of_tie], seen[last_of_tie]
    precision = hits.double() / seen
    steps = RECALL_LEVELS - 1
    # Integers, because 0.3 is not exact in binary and a recall of exactly 0.3 must count.
    best = [precision[steps * hits >= level * hits[-1]].max() for level in range(RECALL_LEVELS)]
    return torch.stack(best).mean()


def make_scores(metric: str, classes: int) -> MulticlassScores | MultilabelScores:
    """Return the object that measures ``metric`` over C ``classes``.

    Raises:
        ConfigError: The metric is unknown.
    """
    if metric not in HEADLINES:
        raise ConfigError(f"metric is {metric!r}; accepted: {', '.join(HEADLINES)}")
    return MultilabelScores(classes) if metric in MULTILABEL else MulticlassScores(classes)


def plain_score(metric: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return ``values`` in the form of result files: all measured values, with counts as integers.

    The first key is ``metric`` if the headline metric is not accuracy.
    """
    result: dict[str, Any] = {} if metric == "accuracy" else {"metric": metric}
    if metric in MULTILABEL:
        return result | {name: float(values[name]) for name in OF_SEVERAL_LABELS} | {"total": round(values["total"])}
    counts = score(round(values["correct"]), round(values["total"]))
    return result | counts | {name: float(values[name]) for name in OF_ONE_LABEL if name != "accuracy"}


def score(correct: int, total: int) -> dict[str, float | int]:
    """Return ``{"accuracy": percent, "correct": n, "total": n}``."""
    return {"accuracy": 100 * correct / total, "correct": correct, "total": total}


def checked_logits(logits: Tensor, method: str) -> Tensor:
    """Return ``logits`` ``[B, C]``; raises NotFiniteError if one of them is not finite."""
    if wrong := int((~logits.isfinite()).any(dim=-1).sum()):
        raise NotFiniteError(
            f"the scores of {wrong} of {len(logits)} images by {method} are not finite, so there is no accuracy. "
            "Compute in full precision: --backbone.precision fp32 --trainer.precision 32-true"
        )
    return logits
