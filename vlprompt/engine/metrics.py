"""What a test measures: counts per class for one label an image, ranking and F1 for several labels.

Numbers are in percent. The three average precisions of the literature are different numbers (datasets.md 1.8): ``map``
is the area under each class's precision-recall curve, ``map_11point`` is VOC2007's mean of the best precision at recall
0, 0.1, ... 1, and a class without a positive image has neither and is left out of the mean. ``cf1`` and ``of1`` are the
mean of the classes' F1 and the F1 of all decisions together, where a label is given from a probability above 0.8.
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
"""The headline metrics that a card may name, and what tables call them."""
F1_THRESHOLD = 0.8
RECALL_LEVELS = 11


def metric_of(task: Any) -> str:
    """Return the headline metric of a task.

    Raises:
        ConfigError: A metric that is not known, or one that does not go with the task's kind of labels.
    """
    several = bool(getattr(task, "multilabel", False))
    # Read by name: a task that says nothing has one label an image and is scored by accuracy.
    name: str = getattr(task, "metric", "map" if several else "accuracy")
    accepted = MULTILABEL if several else MULTICLASS
    if name not in accepted:
        kind = "several labels" if several else "one label"
        raise ConfigError(
            f"{task.name} has {kind} an image and the metric {name!r}; accepted: {' or '.join(accepted)}. "
            "Correct 'metric' in its card."
        )
    return name


def headline(score: Mapping[str, Any]) -> float:
    """Return the number that stands for ``score``: what its ``metric`` names, accuracy where it names none."""
    return float(score[score.get("metric", "accuracy")])


class MulticlassScores(MulticlassStatScores):
    """Counts of correct and of all images per class, exact over all processes.

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
        counts = {name: value.reshape(-1) for name, value in self.compute().items()}  # torchmetrics unpacks one class
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
        logits, labels = (torch.cat(list(one)) if isinstance(one, list) else one for one in (self.logits, self.labels))
        # A mean over classes that no image shows would not be a number.
        columns = [
            (_ranks(own), positive)
            for own, positive in zip(logits.unbind(dim=1), labels.unbind(dim=1), strict=True)
            if positive.any()
        ]
        found = {name: torch.zeros((), dtype=torch.float64, device=logits.device) for name in MULTILABEL}
        if columns:
            found["map"] = torch.stack([binary_average_precision(*one).double() for one in columns]).mean()
            found["map_11point"] = torch.stack([eleven_point(*one) for one in columns]).mean()
        given = (logits.sigmoid() > F1_THRESHOLD).long()
        # Unchecked: torchmetrics would refuse a single class.
        found["cf1"] = multilabel_f1_score(given, labels, self.classes, average="macro", validate_args=False).double()
        found["of1"] = multilabel_f1_score(given, labels, self.classes, average="micro", validate_args=False).double()
        return {name: 100 * value for name, value in found.items()} | {
            "total": torch.tensor(len(labels), dtype=torch.float64, device=logits.device)
        }

    def score(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return the scores as float64 scalars; there are no counts of correct images per class."""
        if not self.logits:  # a process without images joins in with none
            nothing = torch.zeros(0, self.classes, device=self.device)
            self.update(nothing, nothing)
        return self.compute(), {}


def _ranks(logits: Tensor) -> Tensor:
    """Return float64 in 0 ... 1 that rank one class's images as ``logits`` ``[N]`` do, ties included.

    Average precision depends on the order alone. Logits are scaled cosines, whose float32 sigmoid is exactly 1 for
    most of a class's images, and torchmetrics takes the sigmoid of whatever is outside 0 ... 1.
    """
    ranks: Tensor = torch.unique(logits, return_inverse=True)[1]
    return ranks.double() / len(logits)


def eleven_point(ranks: Tensor, positive: Tensor) -> Tensor:
    """Return VOC2007's interpolated average precision, in 0 ... 1, of one class.

    The mean over recall r = 0, 0.1, ... 1 of the best precision at any threshold that reaches r. Images of equal score
    are taken together, so that their order does not matter.

    Args:
        ranks: Scores ``[N]``, larger for what is more likely positive.
        positive: 1 for positive images, else 0, ``[N]``; at least one 1.
    """
    order = ranks.argsort(descending=True)
    ordered = ranks[order]
    hits = positive[order].cumsum(dim=0)
    seen = torch.arange(1, len(ranks) + 1, device=ranks.device)
    last_of_tie = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=ranks.device)])
    hits, seen = hits[last_of_tie], seen[last_of_tie]
    precision = hits.double() / seen
    steps = RECALL_LEVELS - 1
    # In whole numbers: 0.3 is not three tenths in binary, and a recall of exactly 0.3 has to count.
    best = [precision[steps * hits >= level * hits[-1]].max() for level in range(RECALL_LEVELS)]
    return torch.stack(best).mean()


def make_scores(metric: str, classes: int) -> MulticlassScores | MultilabelScores:
    """Return what measures ``metric`` over C ``classes``.

    Raises:
        ConfigError: A metric that is not known.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; accepted: {', '.join(METRICS)}")
    return MultilabelScores(classes) if metric in MULTILABEL else MulticlassScores(classes)


def plain_score(metric: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return a result of ``values`` as files keep it.

    ``{"accuracy", "correct", "total"}``; for another headline ``metric`` that name stands in it, with all that was
    measured.
    """
    if metric == "accuracy":
        return score(round(values["correct"]), round(values["total"]))
    found: dict[str, Any] = {"metric": metric}
    if metric in MULTILABEL:
        names = (*MULTILABEL, "cf1", "of1")
        return found | {name: float(values[name]) for name in names} | {"total": round(values["total"])}
    counts = score(round(values["correct"]), round(values["total"]))
    return found | {"mean_per_class": float(values["mean_per_class"])} | counts


def score(correct: int, total: int) -> dict[str, float | int]:
    """Return ``{"accuracy": percent, "correct": n, "total": n}`` of counts."""
    return {"accuracy": 100 * correct / total, "correct": correct, "total": total}
