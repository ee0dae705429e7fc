"""Updates of class tokens: packed equals padded in features and gradients, for all positions of names and context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt.backbone import Backbone, WordUpdate
from vlprompt.backbone.layout import TokenLayout, context_slot
from vlprompt.errors import BackboneError
from vlprompt.prompts import ExpertContexts, context_layout, template_layout

NAMES = ["cat", "golden_retriever", "cat. dog", "Boeing 737-800", "etc.", "犬", "annual crop land", "cat"]
REACHES = ("name", "suffix", "end-of-text")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def text(request: Any, tiny_backbone: Backbone) -> Any:
    return copy.deepcopy(tiny_backbone).to(request.param).text


def draw(text: Any, *shape: int, seed: int = 0) -> Tensor:
    numbers = 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(text.model.positional_embedding.dtype)


def outcome(text: Any, layout: TokenLayout, context: Tensor, vectors: Tensor, reach: Any, **how: Any) -> list[Tensor]:
    """Return features and the gradients of context, deep context and update, for a fixed cotangent."""
    deep = draw(text, *context.shape, seed=5)
    leaves = [x.detach().clone().requires_grad_() for x in (context, deep, vectors)]
    features = text.encode(layout, leaves[0], {2: leaves[1]}, WordUpdate(leaves[2], reach), **how)
    cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(7)).to(features.dtype)
    return [features.detach(), *torch.autograd.grad((features * cotangent).sum(), leaves)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for value, reference in zip(got, expected, strict=True):
        error = float((value - reference).abs().max())
        assert error <= TOLERANCE[reference.dtype] * float(reference.abs().max()), error


def layouts(text: Any) -> dict[str, tuple[TokenLayout, Tensor]]:
    """Return every kind of layout that methods use, with its context."""
    cases: dict[str, tuple[TokenLayout, Tensor]] = {}
    for position in ("end", "middle", "front"):
        layout = context_layout(text, NAMES, "X X X", 3, position)  # type: ignore[arg-type]
        cases[position] = layout, draw(text, 1, 3, text.width)
    cases["fixed words"] = context_layout(text, NAMES, "a photo of a", 2, "end"), draw(text, 1, 2, text.width)
    specific = context_layout(text, NAMES, "X X", 2, "end", class_specific=True)
    cases["class-specific"] = specific, draw(text, 1, len(NAMES), 2, text.width)
    cases["per image"] = context_layout(text, NAMES, "X X", 2, "end"), draw(text, 3, 2, text.width)
    cases["one class"] = context_layout(text, NAMES[:1], "X X", 2, "end"), draw(text, 1, 2, text.width)
    for counting in ("words", "tokens"):
        experts = ExpertContexts(text, ["a low resolution photo of the {}", "{} texture", "a  {} here"], counting)  # type: ignore[arg-type]
        vectors = experts.vectors().detach().to(text.model.positional_embedding.dtype)
        cases[f"experts by {counting}"] = experts.layout(text, NAMES, period=True), vectors
    return cases


@pytest.mark.covering(rows="reach")
@pytest.mark.parametrize("reach", REACHES)
def test_packed_and_cut_and_chunked_equal_padded(text: Any, reach: Any) -> None:
    chunked = copy.copy(text)
    chunked.classes_per_chunk = 3
    for kind, (layout, context) in layouts(text).items():
        vectors = draw(text, text.context_length, text.width, seed=3)
        padded = outcome(text, layout, context, vectors, reach, algorithm="padded")
        assert bool(padded[3].any()), kind
        assert_same(outcome(text, layout, context, vectors, reach, algorithm="packed"), padded)
        assert_same(outcome(text, layout, context, vectors, reach, algorithm="cut"), padded)
        assert_same(outcome(chunked, layout, context, vectors, reach), padded)


@pytest.mark.parametrize("kind", ["end", "middle", "front", "fixed words", "class-specific", "per image"])
def test_zero_updates_change_nothing_and_other_updates_change_features(text: Any, kind: str) -> None:
    layout, context = layouts(text)[kind]
    plain = text.encode(layout, context)
    vectors = draw(text, text.context_length, text.width)
    for reach in REACHES:
        assert_same([text.encode(layout, context, None, WordUpdate(0 * vectors, reach))], [plain])  # type: ignore[arg-type]
        moved = text.encode(layout, context, None, WordUpdate(vectors, reach))  # type: ignore[arg-type]
        assert float((moved - plain).abs().amax(-1).min()) > 1e-3


# -- reached tokens ---------------------------------------------------------------------------------------------------
def indices(layout: TokenLayout, reach: Any) -> list[list[int]]:
    return [row[: int(n)].tolist() for row, n in zip(layout.word_index(reach)[0], layout.lengths[0], strict=True)]


def test_reach_selects_the_name_the_suffix_or_end_of_text(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    count = len(text.tokens("golden retriever")) - 2
    name, blank = list(range(count)), [-1] * 2
    layout = context_layout(text, ["golden_retriever"], "a photo of a", 2, "end")
    before = [-1] * 5  # start-of-text, two vectors, and the unchanged "of a"
    assert indices(layout, "name") == [[*before, *name, -1, -1]]
    assert indices(layout, "suffix") == [[*before, *name, count, -1]]
    assert indices(layout, "end-of-text") == [[*before, *name, count, count + 1]]
    middle = context_layout(text, ["golden_retriever"], "X X X X", 4, "middle")
    assert indices(middle, "end-of-text") == [[-1, *blank, *name, *blank, count + 2, count + 3]]
    front = context_layout(text, ["golden_retriever"], "X X", 2, "front")
    assert indices(front, "name") == [[-1, *name, *blank, -1, -1]]


def test_a_vector_in_place_of_a_token_of_the_name_excludes_the_token(tiny_backbone: Backbone) -> None:
    """MoCoOp counts words by spaces, so a double space replaces the first token of the name."""
    text = tiny_backbone.text
    experts = ExpertContexts(text, ["a  photo {}", "{}"], "words")
    layout = experts.layout(text, ["golden_retriever"], period=False)
    assert layout.names is not None and not bool((layout.names & (layout.slots < 0)).any())
    count = len(text.tokens("golden retriever")) - 2
    assert int(layout.names[0].sum()) == count - 1 and int(layout.names[1].sum()) == count


def test_a_shared_prefix_has_the_same_offsets_from_the_name() -> None:
    """The third token belongs to the name in one row and follows it in the other, so its update differs."""
    rows = [[90, 5, 6, 91], [90, 5, 6, 7, 91]]
    layout = TokenLayout.from_rows([rows], names=[[[1], [1, 2, 3]]])
    assert layout.prefix_lengths() == [3] and layout.prefix_lengths("name") == [2]
    assert layout.prefix_lengths("suffix") == [3]


def test_word_positions_follow_selected_classes_and_groups() -> None:
    rows = [[[90, context_slot(0), 5, 91], [90, context_slot(0), 6, 7, 91]], [[90, 5, 91], [90, 6, 7, 91]]]
    layout = TokenLayout.from_rows(rows, names=[[[2], [2, 3]], [[1], [1, 2]]])
    assert layout.select(1, 2).word_index("name")[:, 0].tolist() == [[-1, -1, 0, 1, -1], [-1, 0, 1, -1, -1]]
    assert torch.equal(layout.select_groups([1]).word_index("name"), layout.word_index("name")[1:])
    assert torch.equal(
        layout.select_groups([0]).repeat_groups(2).word_index("suffix")[1], layout.word_index("suffix")[0]
    )
    assert layout.context_used.tolist() == [[True], [False]]


def test_mismatched_word_updates_are_refused(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    frozen = template_layout(text, ["cat"], ["a photo of a {}."])
    with pytest.raises(BackboneError, match="does not hold the positions of the names"):
        text.encode(frozen, words=WordUpdate(torch.zeros(77, text.width)))
    layout, context = context_layout(text, ["a b c d"], "X", 1, "end"), torch.zeros(1, text.width)
    for shape in ((3, text.width), (77, text.width + 1), (1, 77, text.width)):
        with pytest.raises(BackboneError, match="word update has shape"):
            text.encode(layout, context, None, WordUpdate(torch.zeros(shape)))
