"""Class names: what is accepted, and the text that names what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprompt.errors import ClassNameError
from vlprompt.prompts import check_class_names, words_of
from vlprompt.prompts.words import check_distinct


@pytest.mark.parametrize(
    "names",
    [
        ["cat"],
        ("cat", "dog"),
        ["sea_lake"],
        ["犬", "🐶", "👩‍🚀", "می‌خواهم", "ß"],
        ["cat", "cat"],
        {"cat": 0, "dog": 1},
        ["x" * 300],
    ],
)
def test_usable_names_come_back_unchanged_as_a_list(names: Any) -> None:
    assert check_class_names(names) == list(names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cat", "one text, 'cat'"),
        (None, "None; expected a list"),
        (3, "3; expected a list"),
        ([], "empty"),
        ((), "empty"),
        (["cat", ""], "class 1: ''"),
        (["cat", "  "], "class 1: '  '"),
        (["_", "cat"], "class 0: '_'"),
        (["cat", None], "class 1: None"),
        (["cat", 7], "class 1: 7"),
        ([b"cat"], "class 0: b'cat'"),
        (["cat\n"], r"class 0: 'cat\\n'"),
        (["a\x00b"], r"class 0: 'a\\x00b'"),
        (["\u200d"], "class 0"),
    ],
)
def test_other_names_are_refused_and_named(names: Any, words: str) -> None:
    with pytest.raises(ClassNameError, match=words):
        check_class_names(names)


def test_all_wrong_names_are_listed_at_once() -> None:
    with pytest.raises(ClassNameError) as caught:
        check_class_names(["", "cat", 5, "dog", "\t"])
    assert all(f"class {i}" in str(caught.value) for i in (0, 2, 4))
    assert "cat" not in str(caught.value)


@given(names=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_visible_characters_always_make_a_name(names: list[str]) -> None:
    visible = [name for name in names if name.replace("_", "")]
    assert not visible or check_class_names(visible) == visible


def test_underscores_become_spaces_in_prompts_only() -> None:
    assert words_of("sea_lake__big") == "sea lake  big"
    assert check_class_names(["sea_lake"]) == ["sea_lake"]


def spelled(text: str) -> list[int]:
    """Stand in for a tokenizer that ignores case and runs of spaces."""
    return [ord(letter) for letter in " ".join(text.lower().split())]


@pytest.mark.parametrize(
    "names", [["sea_lake", "sea lake"], ["Cat", "dog", "cat"], ["a  b", "a b"], ["missile", "x", "Missile", "missile"]]
)
def test_names_of_equal_tokens_are_listed(names: list[str]) -> None:
    with pytest.warns(UserWarning, match="class names have the same tokens") as caught:
        check_distinct(names, spelled)
    assert (
        f"{names[0]!r} (class 0), {names[-1]!r} (class {len(names) - 1})" in str(caught[0].message) or len(names) == 4
    )


@pytest.mark.parametrize("names", [["cat", "cat"], ["a", "dog", "b", "dog"]])
def test_exact_twins_are_refused_unless_they_are_published(names: list[str]) -> None:
    with pytest.raises(ClassNameError, match=f"{names[-1]!r}: classes"):
        check_distinct(names, spelled)
    check_distinct(["missile", "sunglasses", "missile", "cat", "sunglasses"], spelled)
