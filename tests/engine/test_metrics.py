"""Evaluation metrics: hand-computed average precisions and F1, ties, saturated logits, two processes."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from tests.fixtures.processes import in_group
from vlprompt.engine.metrics import (
    METRICS,
    OF_ONE_LABEL,
    OF_SEVERAL_LABELS,
    ClassCounts,
    MulticlassScores,
    MultilabelScores,
    check_metrics,
    counts_of,
    eleven_point,
    headline,
    make_scores,
    measured,
    metric_of,
    plain_score,
    pooled,
    values_of,
)
from vlprompt.errors import ConfigError

# Four images, two classes, best image first in both. A label is assigned for a logit above ln 4 = 1.386, a probability
# of 0.8. Class 0: precision 1 at recall 1/2, 2/3 at recall 1. Class 1: 1/2, 2/3, 3/4 at recall 1/3, 2/3, 1.
LOGITS = torch.tensor([[4.0, 2.0], [3.0, 1.5], [1.0, 1.4], [0.0, 1.3]])
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
EXPECTED = {
    "map": 100 * ((1 / 2 + 1 / 2 * 2 / 3) + (1 / 2 + 2 / 3 + 3 / 4) / 3) / 2,
    "map_11point": 100 * ((6 * 1 + 5 * 2 / 3) / 11 + 3 / 4) / 2,
    "cp": 100 * (1 / 2 + 2 / 3) / 2,  # 1 of the 2 images given class 0, 2 of the 3 given class 1
    "cr": 100 * (1 / 2 + 2 / 3) / 2,  # 1 of the 2 images of class 0, 2 of the 3 of class 1
    "cf1": 100 * (2 * 1 / (2 + 2) + 2 * 2 / (3 + 3)) / 2,  # 2 tp / (given + true) of each class
    "of1": 100 * 2 * 3 / (5 + 5),
    "total": 4.0,
}


def of_several(logits: torch.Tensor, labels: torch.Tensor, batch: int = 3) -> dict[str, float]:
    scores = MultilabelScores(logits.shape[1])
    for start in range(0, len(logits), batch):
        scores.update(logits[start : start + batch], labels[start : start + batch])
    values, counts = scores.score()
    assert counts.total == labels.sum(dim=0).tolist() and counts.mistakes is None
    return {name: float(value) for name, value in values.items()}


# -- several labels per image ---------------------------------------------------------------------------------------
def test_multilabel_scores_by_hand() -> None:
    assert of_several(LOGITS, LABELS) == pytest.approx(EXPECTED, rel=1e-6)
    assert (
        len({round(EXPECTED[name], 3) for name in ("map", "map_11point", "cf1", "of1")}) == 4
    )  # all different numbers
    order = torch.tensor([2, 0, 3, 1])
    assert of_several(LOGITS[order], LABELS[order], batch=1) == pytest.approx(EXPECTED, rel=1e-6)


def test_logits_that_saturate_the_sigmoid_are_still_ranked() -> None:
    scaled = 100 * LOGITS + 500
    assert (scaled.sigmoid() == 1).all()  # the input of a metric on probabilities
    values = of_several(scaled, LABELS)
    assert {name: values[name] for name in ("map", "map_11point")} == pytest.approx(
        {name: EXPECTED[name] for name in ("map", "map_11point")}, rel=1e-6
    )
    everything_given = 100 * 2 * 5 / (8 + 5)
    assert values["of1"] == pytest.approx(everything_given, rel=1e-6)


def test_the_f1_threshold_is_eight_tenths() -> None:
    logits = torch.tensor([[1.38], [1.39]])  # probabilities just below and just above
    assert of_several(logits, torch.tensor([[1.0], [1.0]]))["of1"] == pytest.approx(100 * 2 * 1 / (1 + 2), rel=1e-6)


def test_a_class_without_positives_is_skipped_in_the_means() -> None:
    labels = torch.cat([LABELS, torch.zeros(4, 1)], dim=1)
    values = of_several(torch.cat([LOGITS, torch.full((4, 1), -9.0)], dim=1), labels)
    assert values["map"] == pytest.approx(EXPECTED["map"]) and values["map_11point"] == pytest.approx(
        EXPECTED["map_11point"]
    )
    assert values["cf1"] == pytest.approx(EXPECTED["cf1"] * 2 / 3)  # MULTI-LANE counts it as 0
    nothing = of_several(LOGITS, torch.zeros(4, 2))
    assert nothing == {**dict.fromkeys(("map", "map_11point", "cp", "cr", "cf1", "of1"), 0.0), "total": 4.0}


def naive(scores: list[int], positive: list[int]) -> tuple[Fraction, Fraction]:
    """Return area and 11-point average precision by thresholds, as fractions."""
    curve = []
    for threshold in sorted(set(scores), reverse=True):
        given_ = [hit for score, hit in zip(scores, positive, strict=True) if score >= threshold]
        curve.append((Fraction(sum(given_), sum(positive)), Fraction(sum(given_), len(given_))))
    steps = zip([(Fraction(0), Fraction(0)), *curve], curve, strict=False)
    area = sum(((after - before) * precision for (before, _), (after, precision) in steps), Fraction(0))
    best = [max(p for r, p in curve if r >= Fraction(level, 10)) for level in range(11)]
    return area, sum(best, Fraction(0)) / 11


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), min_size=1, max_size=25))
def test_average_precisions_follow_their_definitions(images: list[tuple[int, int]]) -> None:
    scores, positive = [image[0] for image in images], [image[1] for image in images]
    if not any(positive):
        positive[0] = 1
    area, eleven = naive(scores, positive)
    logits, labels = 30 * torch.tensor(scores).float()[:, None], torch.tensor(positive).float()[:, None]
    values = of_several(logits, labels, batch=7)
    assert values["map"] == pytest.approx(100 * float(area), abs=1e-4)
    assert values["map_11point"] == pytest.approx(100 * float(eleven), abs=1e-9)


def test_a_recall_of_exactly_three_tenths_counts() -> None:
    # 10 positives. Three hits come first, then nine misses, so precision is 1 up to recall 0.3.
    positive = torch.tensor([1] * 3 + [0] * 9 + [1] * 7)
    ranks = torch.arange(len(positive), 0, -1).double()
    rest = 10 / 19  # the best precision beyond, at the end
    assert float(eleven_point(ranks, positive)) == pytest.approx((4 * 1 + 7 * rest) / 11)


def score_a_share(shares: list[slice]) -> list[dict[str, Any]]:
    """Score this process's share of the images by both kinds of labels; return values, values and counts per class."""
    dist.init_process_group("gloo")
    rows = shares[dist.get_rank()]
    multilabel, multiclass = MultilabelScores(2), MulticlassScores(2)
    if len(LOGITS[rows]):
        multilabel.update(LOGITS[rows], LABELS[rows])
        multiclass.update(LOGITS[rows], LABELS[rows, 0].long())
    (values, several), (scores, one) = multilabel.score(), multiclass.score()
    plain = [{name: float(value) for name, value in found.items()} for found in (values, scores)]
    return [*plain, *({**vars(counts), "mistakes": list((counts.mistakes or {}).items())} for counts in (several, one))]


@pytest.mark.parametrize("shares", [[slice(0, 3), slice(3, 4)], [slice(0, 4), slice(4, 4)]], ids=["uneven", "all"])
def test_two_processes_measure_the_same_as_one(shares: list[slice]) -> None:
    first, second = in_group(2, score_a_share, shares)
    assert first == second
    values, scores, several, one = first
    assert values == pytest.approx(EXPECTED, rel=1e-6)
    assert several == {"correct": [1, 2], "total": [2, 3], "answers": [2, 3], "mistakes": []}
    # The guesses are 0, 0, 1, 1; the labels 1, 0, 1, 0.
    mistakes = [((0, 1), 1), ((1, 0), 1)]
    assert one == {"correct": [1, 1], "total": [2, 2], "answers": [2, 2], "mistakes": mistakes}
    assert (scores["correct"], scores["total"], scores["precision"], scores["f1"]) == (2, 4, 50, 50)


# -- one label per image --------------------------------------------------------------------------------------------
def test_counts_per_class_and_their_mean() -> None:
    scores = MulticlassScores(4)
    guesses, labels = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 2])
    scores.update(torch.nn.functional.one_hot(guesses, 4).float(), labels)
    values, counts = scores.score()
    assert counts == ClassCounts([1, 3, 1, 0], [1, 4, 1, 0], [2, 3, 1, 0], {(1, 0): 1})
    plain = {name: float(value) for name, value in values.items()}
    expected = {"accuracy": 100 * 5 / 6, "correct": 5, "total": 6, "mean_per_class": 100 * (1 + 3 / 4 + 1) / 3}
    assert {name: plain[name] for name in expected} == pytest.approx(expected)
    assert set(plain_score("accuracy", plain)) == {*OF_ONE_LABEL, "correct", "total"}
    named = plain_score("mean_per_class", plain)
    assert named["metric"] == "mean_per_class" and headline(named) == pytest.approx(plain["mean_per_class"])
    assert headline(plain_score("accuracy", plain)) == 100 * 5 / 6


def test_a_single_class_is_supported() -> None:
    scores = MulticlassScores(1)
    scores.update(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    values, counts = scores.score()
    assert counts == ClassCounts([3], [3], [3], {}) and (float(values["top5"]), float(values["ece"])) == (100, 0)
    assert float(values["precision"]) == float(values["recall"]) == float(values["f1"]) == 100


def test_precision_recall_and_confusions_are_those_of_torchmetrics() -> None:
    """Classes 7 and 8 have no images; class 7 is an answer, and class 8 is not."""
    draw = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(300, 9, generator=draw), torch.randint(0, 7, (300,), generator=draw)
    logits[:, 8] = -9
    scores = MulticlassScores(9)
    for rows in torch.arange(300).split(64):
        scores.update(logits[rows], labels[rows])
    values, counts = scores.score()
    macro = {"precision": multiclass_precision, "recall": multiclass_recall, "f1": multiclass_f1_score}
    for name, function in macro.items():
        expected = 100 * function(logits, labels, 9, average="macro")
        assert float(values[name]) == pytest.approx(float(expected), rel=1e-6)
        by_class = 100 * function(logits, labels, 9, average=None)
        rows = [0.0 if row is None else row[name] for row in counts.scores()]
        assert rows == pytest.approx(by_class.tolist(), rel=1e-6)
    assert len({round(float(values[name]), 2) for name in macro}) == 3
    assert counts.scores()[8] is None and counts.scores()[7] == {"precision": 0, "recall": 0, "f1": 0}
    assert counts.answers[7] > 0
    table = torch.diag(torch.tensor(counts.correct))
    for (label, answer), images in (counts.mistakes or {}).items():
        table[label, answer] = images
    assert torch.equal(table, multiclass_confusion_matrix(logits, labels, 9))


def test_parts_of_one_class_and_one_mistake_are_pooled() -> None:
    parts = []
    for classes in (1, 2):
        scores = MulticlassScores(classes)
        scores.update(torch.eye(classes)[:1], torch.tensor([classes - 1]))
        scores.score()
        parts.append(scores.sums)
    assert counts_of(pooled([parts[0], parts[0]])) == ClassCounts([2], [2], [2], {})
    assert counts_of(pooled([parts[1], parts[1]])) == ClassCounts([0, 0], [0, 2], [2, 0], {(1, 0): 2})


def test_the_top_five_are_those_of_torchmetrics() -> None:
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 9
    scores = MulticlassScores(9)
    for rows in torch.arange(200).split(64):
        scores.update(logits[rows], labels[rows])
    expected = 100 * multiclass_accuracy(logits, labels, 9, top_k=5, average="micro")
    assert float(scores.score()[0]["top5"]) == pytest.approx(float(expected), rel=1e-6)
    few = MulticlassScores(3)  # all classes are among the first five
    few.update(logits[:, :3], labels % 3)
    assert float(few.score()[0]["top5"]) == 100


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_calibration_error_is_that_of_torchmetrics(scale: float) -> None:
    logits = scale * torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(300) % 4
    scores = MulticlassScores(4)
    for rows in torch.arange(300).split(64):
        scores.update(logits[rows], labels[rows])
    expected = multiclass_calibration_error(logits.double().softmax(dim=-1), labels, 4, n_bins=15)
    assert float(scores.score()[0]["ece"]) == pytest.approx(100 * float(expected), rel=1e-4)


def test_the_calibration_error_by_hand() -> None:
    # Confidences 0.9 (right, wrong) and 1 (right): bins 13/15 ... 14/15 and 14/15 ... 1, which includes 1.
    logits = torch.tensor([[9.0, 1.0], [1.0, 9.0], [1.0, 0.0]]).log()
    scores = MulticlassScores(2)
    scores.update(logits, torch.tensor([0, 0, 0]))
    assert float(scores.score()[0]["ece"]) == pytest.approx(100 * (abs(1 - 2 * 0.9) + 0) / 3)


def test_sums_over_parts_give_the_scores_of_all_images() -> None:
    logits = 3 * torch.randn(90, 7, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(90) % 7
    whole, parts = MulticlassScores(7), []
    for rows in torch.arange(90).split(40):
        part = MulticlassScores(7)
        part.update(logits[rows], labels[rows])
        part.score()
        part.reset()
        parts.append(part.sums)
        whole.update(logits[rows], labels[rows])
    sums = pooled(parts)
    expected, counts = whole.score()
    assert counts_of(sums) == counts
    assert {name: float(value) for name, value in values_of(sums).items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}
    )


# -- the headline metric --------------------------------------------------------------------------------------------
def test_a_multilabel_score_names_its_headline() -> None:
    result = plain_score("map_11point", EXPECTED)
    assert headline(result) == EXPECTED["map_11point"] and result["total"] == 4
    assert set(result) == {"metric", *OF_SEVERAL_LABELS, "total"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "accuracy"),
        ({"multilabel": True}, "map"),
        ({"metric": "mean_per_class", "multilabel": False}, "mean_per_class"),
        ({"metric": "map_11point", "multilabel": True}, "map_11point"),
    ],
)
def test_the_metric_of_a_task(facts: dict[str, Any], expected: str) -> None:
    assert metric_of(SimpleNamespace(name="toy", **facts)) == expected and expected in METRICS


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"metric": "map", "multilabel": False},
            "toy has one label per image and the metric 'map'; accepted: accuracy or",
        ),
        ({"metric": "accuracy", "multilabel": True}, "several labels per image .* accepted: map or map_11point"),
    ],
)
def test_a_metric_for_another_kind_of_labels_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metric_of(SimpleNamespace(name="toy", **facts))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["top_5"], "'top_5' is no metric. Did you mean 'top5'"),
        (["ece", "ece"], "'ece' is named twice"),
        (["map", "ece"], "toy has one label per image and no map; accepted: accuracy, mean_per_class, top5, ece, "
         "precision, recall, f1.*voc has several labels per image and no ece; accepted: map, map_11point, cp, cr, cf1"),
    ],
)  # fmt: skip
def test_metrics_that_cannot_be_shown_are_refused(metrics: list[str], message: str) -> None:
    check_metrics(list(OF_ONE_LABEL), {"toy": False})
    with pytest.raises(ConfigError, match=f"metrics: .*{message}"):
        check_metrics(metrics, {"toy": False, "voc": True})


def test_a_value_that_an_earlier_version_did_not_measure() -> None:
    assert measured({"accuracy": 50.0, "top5": 80.0}, "top5") == 80
    with pytest.raises(ConfigError, match="holds accuracy and no 'ece'.*--force"):
        measured({"accuracy": 50.0, "correct": 1, "total": 2}, "ece")


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="metric is 'f1'; accepted: accuracy, mean_per_class, map, map_11point"):
        make_scores("f1", 3)
