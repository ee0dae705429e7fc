"""The protocol guard's decision: which images may be chosen on, and the stamp."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.errors import ConfigError
from vlprompt.runs.selection import SELECTION, Verdict, is_oracle, judge, record, selection_of, stamped


def test_validation_images_are_fair() -> None:
    assert judge("toy", "val", ["a", "b"], ["c"]) == Verdict("val", oracle=False)
    assert judge("toy", "val", ["a", "b"], ["c"], oracle=True) == Verdict("val", oracle=False)  # nothing to forgive


@pytest.mark.parametrize(
    ("on", "val", "test", "reason"),
    [
        ("test", ["a"], ["b"], "candidates are scored on the test images"),
        ("test", [], ["b"], "candidates are scored on the test images"),
        ("val", ["a", "b", "c"], ["b", "c", "d"], "2 of toy's 3 validation images are test images, too"),
    ],
)
def test_test_images_are_refused_or_an_oracle(on: str, val: list[str], test: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"on validation images only; here {reason}.*Add --oracle"):
        judge("toy", on, val, test)
    assert judge("toy", on, val, test, oracle=True) == Verdict(on, oracle=True, reason=reason)  # type: ignore[arg-type]


@pytest.mark.parametrize("oracle", [False, True])
def test_no_validation_images(oracle: bool) -> None:
    with pytest.raises(
        ConfigError, match="toy has no validation images to choose on. Cut some off .*--on test --oracle"
    ):
        judge("toy", "val", [], ["a"], oracle=oracle)


def test_another_word() -> None:
    with pytest.raises(ConfigError, match="--on is 'tset'; accepted: val or test. Did you mean 'test'"):
        judge("toy", "tset", ["a"], ["b"])


def test_the_stamp(tmp_path: Path) -> None:
    found = record(Verdict("test", True, "why"), {"a": (1, 2)}, [{"values": {"a": 1}, "score": {}}], {"a": 1})
    assert found == {
        "on": "test",
        "oracle": True,
        "reason": "why",
        "grid": {"a": [1, 2]},
        "scores": [{"values": {"a": 1}, "score": {}}],
        "chosen": {"a": 1},
    }
    assert is_oracle([{}, {"selection": found}]) and not is_oracle([{}, {"selection": None}, {"selection": {}}])
    assert (stamped("coop", True), stamped("coop", False)) == ("coop (oracle)", "coop")
    assert selection_of(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"oracle": 1}'])
def test_a_damaged_stamp_is_no_fair_choice(content: str, tmp_path: Path) -> None:
    (tmp_path / SELECTION).write_text(content)
    with pytest.raises(ConfigError, match="selection.json .*search again with --force"):
        selection_of(tmp_path)
