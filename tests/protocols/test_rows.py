"""Rows of tables: deviations where a seed changes something, a name for each variant, reasons for missing scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import base_to_new, base_to_new_table
from vlprompt.protocols.cross import cross_tables
from vlprompt.protocols.domains import domains_tables
from vlprompt.protocols.fewshot import few_shot_table
from vlprompt.protocols.meta_compare import _table as meta_table
from vlprompt.protocols.plan import make_plan, variant_names
from vlprompt.protocols.test_time import compare_test_time, datasets_table
from vlprompt.runs.seeds import ORDER

Tiny = Callable[..., RunConfig]
SAME = {"mean": 60.0, "deviation": 0.0}
HALVES = {"per_seed": [], "base": SAME, "new": SAME, "harmonic_mean": 60.0}
ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "base-to-new": lambda name: dict.fromkeys((name, "zero-shot"), HALVES),
    "few-shot": lambda name: dict.fromkeys((name, "zero-shot"), {"1": SAME}),
    "test-time": lambda name: dict.fromkeys((name, "zero-shot"), SAME),
    "domains": lambda name: dict.fromkeys((name, "zero-shot"), {"clean": {"targets": {"a": SAME}, "mean": SAME}}),
    "cross": lambda name: dict.fromkeys(
        (name, "zero-shot"), {"source": SAME, "targets": {"a": SAME}, "mean_of_targets": SAME}
    ),
}


def table_of(protocol: str, name: str, seeds: list[int], **marks: Any) -> str:
    """Return the table of a protocol with a cell of the method ``name``."""
    cell = {"method": name, "data": "demo", "shots": 1, "rows": ROWS[protocol](name), **marks}
    if protocol == "base-to-new":
        return base_to_new_table([cell], seeds)
    if protocol == "few-shot":
        return few_shot_table([cell], [1], seeds)
    if protocol == "test-time":
        return datasets_table([cell], [], "test-time", seeds)
    cell |= {"targets": ["a"], "metrics": {"a": "accuracy"}, "versions": ["clean"]}
    return domains_tables([cell], "leave-one-out", seeds) if protocol == "domains" else cross_tables([cell], "x", seeds)


@pytest.mark.parametrize("protocol", ROWS)
def test_a_deviation_is_shown_only_where_a_seed_changes_something(protocol: str) -> None:
    fixed = table_of(protocol, "mta", [1, 2], seed_draws=[])
    assert "±" not in fixed and "no deviation: the results of zero-shot, mta do not depend on the seed" in fixed
    drawn = table_of(protocol, "coop", [1, 2], seed_draws=["the training images"])
    assert "60.00 ± 0.00" in drawn and "the results of zero-shot do not depend on the seed" in drawn
    stream = table_of(protocol, "tda", [1, 2], seed_draws=[ORDER])
    assert "60.00 ± 0.00" in stream and f"tda: the seeds draw {ORDER} only" in stream
    older = table_of(protocol, "coop", [1, 2])  # without a record of what seeds draw
    assert "60.00 ± 0.00" in older
    assert "depend on the seed" not in table_of(protocol, "mta", [1], seed_draws=[])


def test_zero_shot_has_no_standard_error() -> None:
    value = {"mean": 60.0, "standard_error": 0.0, "per_seed": [60.0, 60.0]}
    cells = [
        {"method": "coop", "data": "demo", "shots": 1, "start": start, "base": value, "new": value, "H": value}
        for start in ("zero-shot", "usual start")
    ]
    rows = [line for line in meta_table(cells, [1, 2]).splitlines() if "60.00" in line]
    assert ["±" in row for row in rows] == [False, True]


def test_runs_without_draws_have_no_deviation_in_the_table(tiny: Tiny) -> None:
    config = tiny("zero", {"crops": 0, "templates": ["a {}."], "confidence": 1.0})
    results, table = compare_test_time([config, tiny("tda")], [1, 2])
    assert [cell["seed_draws"] for cell in results["cells"]] == [[], [ORDER]]
    assert "the results of zero-shot" in table and "zero" in table and f"the seeds draw {ORDER} only" in table


# -- variants ---------------------------------------------------------------------------------------------------------
def test_variants_of_a_method_have_different_names(tiny: Tiny) -> None:
    plain, knowledge = tiny("coop"), tiny("coop", objectives={"knowledge": {}})
    assert variant_names([plain, tiny("tda")]) == ["coop", "tda"]
    assert variant_names([plain, knowledge]) == ["coop", "coop+knowledge"]
    slow = tiny("coop", lr=0.5)
    assert variant_names([plain, slow, knowledge]) == ["coop recipe.lr=0.002", "coop recipe.lr=0.5", "coop+knowledge"]
    words = tiny("coop", {"context_init": "one"})
    assert variant_names([plain, words]) == ["coop context_init=an emoji of a", "coop context_init=one"]
    assert variant_names([plain, plain]) == ["coop #1", "coop #2"]


def test_two_variants_have_two_columns(tiny: Tiny) -> None:
    variants = [tiny("tda", {"positive_alpha": alpha}) for alpha in (1.0, 5.0)]
    results, table = compare_test_time(variants, [1])
    names = [f"tda positive_alpha={alpha}" for alpha in (1.0, 5.0)]
    assert [cell["variant"] for cell in results["cells"]] == names
    assert all(f"positive_alpha={alpha}" in table for alpha in (1.0, 5.0))


# -- reasons ----------------------------------------------------------------------------------------------------------
def test_a_missing_score_on_new_classes_has_a_reason(tiny: Tiny) -> None:
    results, table = base_to_new([tiny("coop", {"class_specific": True, "context_init": ""}, epochs=1)], [1])
    (cell,) = results["cells"]
    assert "class_specific" in cell["why_no_new"] and "coop has no scores on new classes: this CoOp was" in table


def test_a_fitted_method_is_refused_in_the_plan(tiny: Tiny) -> None:
    config = tiny("tip_adapter").with_data(name="demo", root=None)
    with pytest.raises(ConfigError, match=r"fitted on images of the classes of demo and cannot classify those of dtd"):
        make_plan([config], [1], "cross-dataset", "datasets", targets=["dtd"], dry=True)
