"""Evaluation metrics: counts per class for one label per image, ranking and F1 for several labels.

Values are in percent. ``map`` is the mean area under the classes' precision-recall curves. ``map_11point`` is the mean
of VOC2007's 11-point average precision, the best precision at recall 0, 0.1, ... 1. Both means skip classes without a
positive image. ``cf1`` is the mean F1 of the classes and ``of1`` the F1 of all decisions together; a label is assigned
if its probability is above 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassStatScores
from torchmetrics.functional.classification import binary_average_precision, multilabel_f1_score

from vlprompt.errors import ConfigError

MULTICLASS: Mapping[str, str] = {"accuracy": "accuracy", "mean_per_class": "mean per-class accuracy"}
MULTILABEL: Mapping[str, str] = {"map": "mAP", "map_11point": "11-point mAP"}
METRICS: Mapping[str, str] = {**MULTICLASS, **MULTILABEL}
"""Headline metrics accepted in cards, with their names in tables."""
F1_THRESHOLD = 0.8
RECALL_LEVELS = 11


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
    return float(score[score.get("metric", "accuracy")])


class MulticlassScores(MulticlassStatScores):
    """Numbers of correct and of all images per class, exact over all processes.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=max(2, classes), average=None)
        self.classes = classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits ``[B, C]`` and labels ``[B]``."""
        super().update(preds.argmax(dim=-1), target)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``correct`` and ``total``, int64 ``[C]``."""
        counts = super().compute()[: self.classes]
        return {"correct": counts[:, 0], "total": counts[:, 4]}

    def score(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return the scores as float64 scalars, and the counts per class."""
        counts = {name: value.reshape(-1) for name, value in self.compute().items()}  # a single class is a scalar
        correct, total = counts["correct"], counts["total"]
        shown = total > 0
        scores = {
            "accuracy": 100 * correct.sum().double() / total.sum(),
            "correct": correct.sum().double(),
            "total": total.sum().double(),
            "mean_per_class": 100 * (correct[shown].double() / total[shown]).mean(),
        }
        return scores, {name: value.tolist() for name, value in counts.items()}


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
        """Return ``map``, ``map_11point``, ``cf1``, ``of1`` and ``total`` as float64 scalars."""
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
        values["cf1"] = multilabel_f1_score(
            assigned, labels, self.classes, average="macro", validate_args=False
        ).double()
        values["of1"] = multilabel_f1_score(
            assigned, labels, self.classes, average="micro", validate_args=False
        ).double()
        return {name: 100 * value for name, value in values.items()} | {
            "total": torch.tensor(len(labels), dtype=torch.float64, device=logits.device)
        }

    def score(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return the scores as float64 scalars, and no counts per class."""
        if not self.logits:  # a process without images still takes part in the reduction
            nothing = torch.zeros(0, self.classes, device=self.device)
            self.update(nothing, nothing)
        return self.compute(), {}


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
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; accepted: {', '.join(METRICS)}")
    return MultilabelScores(classes) if metric in MULTILABEL else MulticlassScores(classes)


def plain_score(metric: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return ``values`` in the form of result files.

    The keys are ``accuracy``, ``correct`` and ``total``. For another headline ``metric`` they are ``metric`` and all
    measured values.
    """
    if metric == "accuracy":
        return score(round(values["correct"]), round(values["total"]))
    result: dict[str, Any] = {"metric": metric}
    if metric in MULTILABEL:
        names = (*MULTILABEL, "cf1", "of1")
        return result | {name: float(values[name]) for name in names} | {"total": round(values["total"])}
    counts = score(round(values["correct"]), round(values["total"]))
    return result | {"mean_per_class": float(values["mean_per_class"])} | counts


def score(correct: int, total: int) -> dict[str, float | int]:
    """Return ``{"accuracy": percent, "correct": n, "total": n}``."""
    return {"accuracy": 100 * correct / total, "correct": correct, "total": total}
