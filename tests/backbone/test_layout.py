"""Token layouts: shared prefixes, token counts and the index tensors of the packing."""

from __future__ import annotations

import pytest
import torch

from vlprompt.backbone.layout import TokenLayout, check_row_lengths, context_slot
from vlprompt.errors import ClassNameError

SOT, EOT = 90, 91
C0, C1, C2 = (context_slot(m) for m in range(3))


def test_context_slots_are_negative_and_start_at_minus_one() -> None:
    assert [context_slot(m) for m in range(3)] == [-1, -2, -3]


def test_from_rows_keeps_tokens_and_lengths_and_pads_with_zero() -> None:
    layout = TokenLayout.from_rows([[[SOT, C0, 5, EOT], [SOT, C0, EOT]], [[SOT, 7, 8, 9, EOT], [SOT, EOT]]])
    assert (layout.groups, layout.classes, layout.context_length) == (2, 2, 1)
    assert layout.lengths.tolist() == [[4, 3], [5, 2]]
    assert layout.slots.tolist() == [
        [[SOT, -1, 5, EOT, 0], [SOT, -1, EOT, 0, 0]],
        [[SOT, 7, 8, 9, EOT], [SOT, EOT, 0, 0, 0]],
    ]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one"),
        ([[]], "at least one"),
        ([[[SOT, EOT]], []], "same number of classes"),
        ([[[SOT, EOT]], [[SOT, EOT], [SOT, EOT]]], "same number of classes"),
        ([[[SOT, EOT], [EOT]]], "start-of-text and end-of-text"),
    ],
)
def test_from_rows_refuses_unequal_groups_and_short_rows(groups: list[list[list[int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_rows(groups)


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        ([[SOT, C0, C1, 5, EOT], [SOT, C0, C1, 6, 7, EOT]], 3),
        ([[SOT, C0, C1, 5, EOT], [SOT, C0, C1, 5, EOT]], 4),  # duplicates: all but the pooled slot
        ([[SOT, 5, EOT]], 2),  # one class
        ([[SOT, C0, EOT], [SOT, C0, EOT, 5, EOT]], 2),  # one row is the beginning of another
        ([[SOT, 5, C0, EOT], [SOT, 6, C0, EOT]], 1),  # context after the name
        ([[SOT, EOT], [SOT, EOT]], 1),
        ([[SOT, 5, 0, EOT], [SOT, 5, EOT]], 2),  # token 0 is a token, padding is not
    ],
)
def test_prefix_is_shared_by_all_classes_and_excludes_the_pooled_slot(rows: list[list[int]], prefix: int) -> None:
    assert TokenLayout.from_rows([rows]).prefix_lengths() == [prefix]


def test_prefix_is_computed_per_group() -> None:
    layout = TokenLayout.from_rows([[[SOT, C0, 5, EOT], [SOT, C0, 6, EOT]], [[SOT, 5, EOT], [SOT, 6, 6, EOT]]])
    assert layout.prefix_lengths() == [2, 1]


def test_class_specific_context_is_not_shared() -> None:
    rows = [[SOT, 4, C0, 5, EOT], [SOT, 4, C0, 6, EOT]]
    assert TokenLayout.from_rows([rows]).prefix_lengths() == [3]
    assert TokenLayout.from_rows([rows], class_specific=True).prefix_lengths() == [2]


def test_token_counts_packed_and_padded() -> None:
    layout = TokenLayout.from_rows([[[SOT, C0, C1, 5, EOT], [SOT, C0, C1, 6, 7, EOT]]])
    assert layout.token_counts() == (3 + 2 + 3, 2 * 6)
    both = TokenLayout.from_rows([[[SOT, C0, 5, EOT], [SOT, C0, 6, EOT]], [[SOT, 5, EOT], [SOT, 6, 6, EOT]]])
    assert both.token_counts() == ((2 + 2 + 2) + (1 + 2 + 3), 4 * 4)


def test_token_counts_at_coops_size_match_the_published_saving() -> None:
    # 1,000 names of 2.2 tokens on average: 77,000 padded tokens compared with about (1 + M) + 4.2 C.
    rows = [[SOT, C0, C1, *range(100 + c, 101 + c + c % 4), 13, EOT] for c in range(1000)]
    assert TokenLayout.from_rows([rows]).token_counts()[0] == 3 + sum(3 + c % 4 for c in range(1000))


def test_select_keeps_the_chosen_classes_of_every_group() -> None:
    layout = TokenLayout.from_rows([[[SOT, c, C0, EOT] for c in range(1, 5)], [[SOT, c, EOT] for c in range(5, 9)]])
    selected = layout.select(1, 3)
    assert (selected.groups, selected.classes) == (2, 2)
    assert selected.slots[:, :, 1].tolist() == [[2, 3], [6, 7]]
    assert selected.lengths.tolist() == [[4, 4], [3, 3]]
    assert not selected.class_specific
    assert TokenLayout.from_rows([[[SOT, C0, EOT]]], class_specific=True).select(0, 1).class_specific


def test_repeat_groups_repeats_the_words_per_image() -> None:
    layout = TokenLayout.from_rows([[[SOT, C0, 5, EOT], [SOT, C0, 6, 7, EOT]]])
    repeated = layout.repeat_groups(3)
    assert (repeated.groups, repeated.classes) == (3, 2)
    assert all(torch.equal(repeated.slots[g], layout.slots[0]) for g in range(3))
    assert repeated.prefix_lengths() == [2, 2, 2]


def test_plan_covers_every_token_once_and_is_cached() -> None:
    rows = [
        [[SOT, C0, 5, EOT], [SOT, C0, 6, 7, EOT], [SOT, C0, 8, EOT]],
        [[SOT, 5, EOT], [SOT, 6, 7, C1, EOT], [SOT, EOT]],
    ]
    layout = TokenLayout.from_rows(rows)
    plan = layout.plan(torch.device("cpu"))
    assert plan is layout.plan(torch.device("cpu"))
    assert plan.prefix_tokens == 2 + 1
    assert len(plan.token_ids) == layout.token_counts()[0] == plan.prefix_tokens + sum(n * r for n, r in plan.blocks)
    assert plan.blocks == [(1, 1), (2, 3), (3, 1), (4, 1)]
    # Pooled tokens, restored to [G, C] order, are the last tokens of the rows.
    pooled = plan.token_ids[plan.prefix_tokens :][plan.pooled_at][plan.restore]
    assert pooled.tolist() == [row[-1] for group in rows for row in group]
    positions = plan.position[plan.prefix_tokens :][plan.pooled_at][plan.restore]
    assert positions.tolist() == [len(row) - 1 for group in rows for row in group]
    assert plan.context_vector.tolist() == [0, 1]
    assert plan.context_owner.tolist() == [0, 1]


def test_distributing_tokens_to_groups_and_back_changes_nothing() -> None:
    layout = TokenLayout.from_rows([[[SOT, C0, 5, EOT], [SOT, C0, 6, 7, EOT]], [[SOT, 5, EOT], [SOT, 6, 7, 8, 9, EOT]]])
    plan = layout.plan(torch.device("cpu"))
    tokens = torch.arange(len(plan.token_ids) - plan.prefix_tokens, dtype=torch.float32)[:, None]
    grouped = plan.suffix_by_group.deal(tokens)
    assert grouped.shape[:2] == (2, 7)
    assert torch.equal(plan.suffix_by_group.collect(grouped), tokens)


def test_all_rows_that_are_too_long_are_listed() -> None:
    check_row_lengths(["cat", "dog"], [77, 2], 77, "a photo")
    with pytest.raises(ClassNameError) as caught:
        check_row_lengths(["cat", "a" * 200, "dog"], [78, 90, 77], 77, "16 context tokens")
    text = str(caught.value)
    assert "2 of 3 class prompts are longer than the 77 tokens" in text
    assert "'cat': 78 tokens" in text and ": 90 tokens" in text and "16 context tokens" in text
    assert "dog" not in text and "a" * 81 not in text


def test_a_long_list_of_names_ends_with_a_count() -> None:
    with pytest.raises(ClassNameError, match=r"and 15 more") as caught:
        check_row_lengths([f"class {i}" for i in range(25)], [99] * 25, 77, "a template")
    assert str(caught.value).count("\n") < 15
