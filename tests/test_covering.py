"""Which pairs ``make test`` runs: every value of both sides, in a choice that is the same every time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.covering import chosen

pytest_plugins = ["pytester"]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 30))
def test_every_row_and_every_column_are_met(rows: int, columns: int, every: int, shift: int) -> None:
    pairs = list(itertools.product(range(rows), range(columns)))
    kept = [pair for pair, keep in zip(pairs, chosen([row for row, _ in pairs], every, shift), strict=True) if keep]
    assert {row for row, _ in kept} == set(range(rows))
    if rows >= min(every, columns):
        assert {column for _, column in kept} == set(range(columns))
    assert len(kept) <= rows * (1 + columns // every)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_as_many_checks_as_variants_meet_every_variant(sizes: list[int]) -> None:
    cases = [(row, variant) for row, size in enumerate(sizes) for variant in range(size)]
    met: set[tuple[int, int]] = set()
    for check in range(max(sizes)):
        kept = [case for case, keep in zip(cases, chosen([row for row, _ in cases], None, check), strict=True) if keep]
        assert [row for row, _ in kept] == list(range(len(sizes)))  # each row meets each check once
        met |= set(kept)
    assert met == set(cases)


MODULE = """
import pytest

@pytest.mark.covering(rows="a")
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("a", "xyz")
def test_pairs(a, b):
    assert a

@pytest.mark.covering(every=2)
@pytest.mark.parametrize("c", range(4))
def test_row(c):
    assert c >= 0

def test_single():
    assert True
"""


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        ([], 3 + 2 + 1),
        (["--all-pairs"], 9 + 4 + 1),
        (["test_it.py::test_pairs"], 3),
        (["test_it.py::test_pairs[x-1]", "test_it.py::test_pairs[x-2]"], 2),  # named in full: it is run
        (["-k", "x"], 1),
    ],
)
def test_the_option(words: list[str], passed: int, pytester: Any) -> None:
    (pytester.path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(test_it=MODULE)
    root = Path(__file__).parents[1]
    pytester.makeini(f"[pytest]\npythonpath = {root}\nmarkers = covering\naddopts = --strict-markers")
    pytester.runpytest_inprocess(*words).assert_outcomes(passed=passed)
