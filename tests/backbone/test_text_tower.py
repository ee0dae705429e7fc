"""The packed text tower equals the padded one in features and gradients, for all layouts, contexts and precisions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.backbone import Backbone
from vlprompt.backbone.layout import TokenLayout, context_slot
from vlprompt.errors import ClassNameError
from vlprompt.prompts import ExpertContexts, context_layout, template_layout

FLOAT32, FLOAT64 = 1e-5, 1e-10
bounded = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,  # the same examples on every machine and run
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

Outcome = tuple[Tensor, list[Tensor]]


@pytest.fixture(scope="module")
def text(tiny_backbone: Backbone) -> Any:
    return tiny_backbone.text


@pytest.fixture(scope="module")
def text64(tiny_backbone: Backbone) -> Any:
    return copy.deepcopy(tiny_backbone).double().text


def outcome(
    tower: Any, layout: TokenLayout, context: Tensor | None, deep: dict[int, Tensor] | None = None, **how: Any
) -> Outcome:
    """Return features and the gradients of all inputs, for a fixed cotangent."""
    leaves = [None if context is None else context.detach().clone().requires_grad_()]
    deep_leaves = {layer: x.detach().clone().requires_grad_() for layer, x in (deep or {}).items()}
    features = tower.encode(layout, leaves[0], deep_leaves, **how)
    leaves += list(deep_leaves.values())
    given_leaves = [leaf for leaf in leaves if leaf is not None]
    if given_leaves:
        cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(7)).to(features.dtype)
        (features * cotangent).sum().backward()
    return features.detach(), [leaf.grad for leaf in given_leaves if leaf.grad is not None]


def assert_same(got: Outcome, expected: Outcome, tolerance: float) -> None:
    pairs = [(got[0], expected[0]), *zip(got[1], expected[1], strict=True)]
    for value, reference in pairs:
        assert value.shape == reference.shape
        assert float((value - reference).abs().max()) <= tolerance * float(reference.abs().max()) + 1e-30


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_exact(
    text: Any, text64: Any, layout: TokenLayout, context: Tensor | None, deep: dict[int, Tensor] | None = None
) -> None:
    """Check that packed and cut equal padded, in float32 and in float64."""
    for tower, dtype, tolerance in ((text, torch.float32, FLOAT32), (text64, torch.float64, FLOAT64)):
        inputs = None if context is None else context.to(dtype)
        deep_inputs = {layer: x.to(dtype) for layer, x in (deep or {}).items()}
        padded = outcome(tower, layout, inputs, deep_inputs, algorithm="padded")
        assert padded[0].dtype == dtype
        assert_same(outcome(tower, layout, inputs, deep_inputs, algorithm="packed"), padded, tolerance)
        assert_same(outcome(tower, layout, inputs, deep_inputs, algorithm="cut"), padded, tolerance)


# -- class names ----------------------------------------------------------------------------------------------------
WORDS = [
    "cat",
    "golden_retriever",
    "Boeing 737-800",
    "crème brûlée",
    "犬",
    "🐶🚀",
    "собака",
    "R2-D2",
    "o'clock",
    "x.y",
    "ß",
]
names_of_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
long_names = st.integers(1, 70).map(lambda count: " ".join(["x"] * count))  # one token each
any_names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(str.strip)
class_names = st.lists(st.one_of(names_of_words, long_names, any_names), min_size=1, max_size=4)


@given(
    names=class_names,
    length=st.integers(1, 4),
    position=st.sampled_from(["end", "middle", "front"]),
    specific=st.booleans(),
)
@bounded
def test_context_before_around_and_after_any_names(
    text: Any, text64: Any, names: list[str], length: int, position: Any, specific: bool
) -> None:
    names = [name for name in names if len(text.tokens(name)) <= 72] or ["x"]
    layout = context_layout(text, names, " ".join(["X"] * length), length, position, class_specific=specific)
    shape = (1, len(names), length, text.width) if specific else (1, length, text.width)
    check_exact(text, text64, layout, draw(shape))


@given(
    names=class_names,
    templates=st.lists(
        st.sampled_from(["{}", "a photo of a {}.", "{} in a video game", "itap of {}"]), min_size=1, max_size=3
    ),
)
@bounded
def test_template_ensembles_of_any_names(text: Any, text64: Any, names: list[str], templates: list[str]) -> None:
    names = [name for name in names if len(text.tokens(name)) <= 70] or ["x"]
    check_exact(text, text64, template_layout(text, names, templates), None)


@given(names=class_names, period=st.booleans(), counting=st.sampled_from(["words", "tokens"]))
@bounded
def test_experts_with_prefixes_of_unequal_length(
    text: Any, text64: Any, names: list[str], period: bool, counting: Any
) -> None:
    names = [name for name in names if len(text.tokens(name)) <= 66] or ["x"]
    templates = ["a low resolution photo of the {}", "a photo of a  {}", "{} texture", "{}"]
    experts = ExpertContexts(text, templates, counting)
    check_exact(text, text64, experts.layout(text, names, period=period), experts.vectors().detach())


# -- layouts that no method uses yet --------------------------------------------------------------------------------
@st.composite
def layouts(draw_value: Any, max_groups: int = 3) -> TokenLayout:
    """Draw rows of tokens and up to four context slots in any order, each slot at most once, in up to three groups."""
    classes = draw_value(st.integers(1, 5))
    groups = []
    for _ in range(draw_value(st.integers(1, max_groups))):
        shared = draw_value(st.lists(st.integers(1, 400), max_size=5))
        slots = draw_value(st.permutations([context_slot(m) for m in range(4)]))
        cut = draw_value(st.integers(0, 4))
        rows = []
        for _ in range(classes):
            tokens = draw_value(st.lists(st.integers(1, 400), max_size=6))  # empty: the suffix is only end-of-text
            tail = list(slots[cut:])
            for token in tokens:
                tail.insert(draw_value(st.integers(0, len(tail))), token)
            rows.append([49406, *slots[:cut], *shared, *tail, 49407])
        groups.append(rows)
    return TokenLayout.from_rows(groups, class_specific=draw_value(st.booleans()))


@st.composite
def deep_layers(draw_value: Any) -> dict[int, int]:
    """Draw layers 1 to 3 of the tiny backbone, each with the number of vectors (1 to 4) that it overwrites."""
    layers = draw_value(st.lists(st.integers(1, 3), unique=True, max_size=3))
    return {layer: draw_value(st.integers(1, 4)) for layer in layers}


@given(layout=layouts(), deep=deep_layers())
@bounded
def test_any_layout_with_deep_context_at_chosen_layers(
    text: Any, text64: Any, layout: TokenLayout, deep: dict[int, int]
) -> None:
    lead = (layout.groups, layout.classes) if layout.class_specific else (layout.groups,)
    vectors = {layer: draw((*lead, count, text.width), seed=layer) for layer, count in deep.items()}
    check_exact(text, text64, layout, draw((*lead, 4, text.width)), vectors)


@given(layout=layouts(max_groups=1), images=st.integers(2, 4), deep=deep_layers(), shared_deep=st.booleans())
@bounded
def test_a_context_per_image_repeats_a_one_group_layout(
    text: Any, text64: Any, layout: TokenLayout, images: int, deep: dict[int, int], shared_deep: bool
) -> None:
    lead = (images, layout.classes) if layout.class_specific else (images,)
    deep_lead = (1, *lead[1:]) if shared_deep else lead
    vectors = {layer: draw((*deep_lead, count, text.width), seed=layer) for layer, count in deep.items()}
    context = draw((*lead, 4, text.width))
    check_exact(text, text64, layout, context, vectors)
    # Each image's features depend only on its context.
    features = text.encode(layout, context, vectors)
    assert features.shape == (images, layout.classes, 64)
    last = {layer: x if shared_deep else x[-1:] for layer, x in vectors.items()}
    alone = text.encode(layout, context[-1:], last)
    assert_same((features[-1:], []), (alone, []), FLOAT32)


@given(layout=layouts(), size=st.integers(1, 4), deep=deep_layers())
@bounded
def test_chunks_of_classes_change_nothing(
    text: Any, text64: Any, layout: TokenLayout, size: int, deep: dict[int, int]
) -> None:
    lead = (layout.groups, layout.classes) if layout.class_specific else (layout.groups,)
    for tower, dtype, tolerance in ((text, torch.float32, FLOAT32), (text64, torch.float64, FLOAT64)):
        context = draw((*lead, 4, tower.width), dtype=dtype)
        vectors = {layer: draw((*lead, n, tower.width), layer, dtype) for layer, n in deep.items()}
        whole = outcome(tower, layout, context, vectors)
        chunked = copy.copy(tower)
        chunked.classes_per_chunk = size
        assert_same(outcome(chunked, layout, context, vectors), whole, tolerance)


# -- sizes and corner cases -----------------------------------------------------------------------------------------
def test_a_thousand_classes(tiny_state_dict: Any) -> None:
    state = tiny_state_dict(text_width=64, text_layers=2, vision_layers=1, vision_width=64)
    tower = Backbone.from_state_dict(state).text
    names = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(1000)]
    layout = context_layout(tower, names, "X X X X", 4, "end")
    packed, padded = layout.token_counts()
    assert packed < padded / 2
    context = draw((4, tower.width))
    whole = outcome(tower, layout, context)
    assert whole[0].shape == (1, 1000, 64)
    assert_same(whole, outcome(tower, layout, context, algorithm="padded"), FLOAT32)
    tower.classes_per_chunk = 300
    assert_same(outcome(tower, layout, context), whole, FLOAT32)


def test_one_class_duplicates_and_identical_rows(text: Any, text64: Any) -> None:
    for names in (["cat"], ["cat", "cat", "cat"], ["dog", "cat", "dog"]):
        layout = context_layout(text, names, "X X", 2, "end")
        check_exact(text, text64, layout, draw((2, text.width)))
        features = text.encode(layout, draw((2, text.width)))[0]
        if len(names) == 3:
            torch.testing.assert_close(features[0], features[2])


def test_a_prompt_of_77_tokens_is_accepted_and_one_of_78_is_refused_by_name(text: Any, text64: Any) -> None:
    fits, over = " ".join(["x"] * 70), " ".join(["y"] * 71)
    layout = context_layout(text, [fits, "cat"], "X X X X", 4, "end")
    assert layout.lengths.max() == 77
    check_exact(text, text64, layout, draw((4, text.width)))
    with pytest.raises(ClassNameError, match="1 of 2") as caught:
        context_layout(text, [over, "cat"], "X X X X", 4, "end")
    assert "y y y" in str(caught.value) and "78 tokens" in str(caught.value) and "cat" not in str(caught.value)


def test_all_names_that_are_too_long_are_listed_for_templates_and_experts(text: Any) -> None:
    long, longer = " ".join(["x"] * 80), " ".join(["y"] * 90)
    for make in (
        lambda: template_layout(text, [long, "cat", longer], ["a photo of a {}."]),
        lambda: ExpertContexts(text, ["a photo of a {}"]).layout(text, [long, "cat", longer], period=False),
    ):
        with pytest.raises(ClassNameError, match="2 of 3") as caught:
            make()
        assert "x x x" in str(caught.value) and "y y y" in str(caught.value)


def test_words_are_tokenised_as_open_clip_does(text: Any) -> None:
    for name in [*WORDS, "a  photo &amp; more ", "CAT"]:
        tokens = text.tokens(name)
        assert text.tokenizer([name])[0, : len(tokens)].tolist() == tokens


def test_embeddings_are_float32_copies_of_the_table(text: Any) -> None:
    tokens = text.tokens("a photo")
    vectors = text.embed(tokens)
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    assert torch.equal(vectors, text.model.token_embedding.weight[tokens])
    vectors.zero_()
    assert text.model.token_embedding.weight[tokens].abs().sum() > 0


@pytest.mark.parametrize("algorithm", ["packed", "cut", "padded"])
def test_templates_match_open_clips_encode_text(tiny_backbone: Backbone, algorithm: Any) -> None:
    text, names = tiny_backbone.text, [*WORDS, " ".join(["x"] * 60)]
    templates = ["a photo of a {}.", "{}", "itap of the {} in a video game"]
    features = text.encode(template_layout(text, names, templates), algorithm=algorithm)
    for template, group in zip(templates, features, strict=True):
        ids = text.tokenizer([template.replace("{}", name.replace("_", " ")) for name in names])
        assert_same((group, []), (tiny_backbone.model.encode_text(ids), []), FLOAT32)


def test_context_from_word_embeddings_gives_the_features_of_the_words(text: Any) -> None:
    names = ["cat", "golden_retriever"]
    layout = context_layout(text, names, "a photo of a", 4, "end")
    features = text.encode(layout, text.embed(text.tokens("a photo of a")[1:-1]))
    assert_same((features, []), (text.encode(template_layout(text, names, ["a photo of a {}."])), []), FLOAT32)


def test_no_grad_gives_the_same_features_without_a_graph(text: Any) -> None:
    layout = context_layout(text, ["cat", "tabby cat"], "X X", 2, "end")
    context = draw((2, text.width)).requires_grad_()
    with_graph = text.encode(layout, context)
    chunked = copy.copy(text)
    chunked.classes_per_chunk = 1
    with torch.no_grad():
        assert torch.equal(text.encode(layout, context), with_graph.detach())
        assert not text.encode(layout, context).requires_grad
        assert_same((chunked.encode(layout, context), []), (with_graph, []), FLOAT32)
    assert with_graph.requires_grad


def test_repeated_calls_are_bit_identical(text: Any) -> None:
    layout = context_layout(text, WORDS, "X X X", 3, "middle")
    first = outcome(text, layout, draw((3, text.width)))
    again = outcome(text, layout, draw((3, text.width)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1][0], again[1][0])


def test_the_backbone_gets_no_gradient(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    outcome(text, context_layout(text, WORDS, "X", 1, "end"), draw((1, text.width)))
    assert all(p.grad is None and not p.requires_grad for p in tiny_backbone.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_backbones_accept_float32_context_and_return_float32_features(
    tiny_state_dict: Any, precision: str
) -> None:
    wide = Backbone.from_state_dict(tiny_state_dict()).text
    narrow = Backbone.from_state_dict(tiny_state_dict(), precision=precision).text
    layout = context_layout(wide, WORDS, "X X", 2, "end")
    context = draw((2, wide.width))
    reference = outcome(wide, layout, context)
    packed, padded = outcome(narrow, layout, context), outcome(narrow, layout, context, algorithm="padded")
    assert packed[0].dtype == packed[1][0].dtype == torch.float32
    for got in (packed, padded):
        assert_same(got, reference, 0.05)
    assert_same(packed, padded, 0.05)


def test_autocast_stays_near_float32(text: Any) -> None:
    layout = context_layout(text, WORDS, "X X", 2, "end")
    context = draw((2, text.width))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = outcome(text, layout, context)
    assert_same(mixed, outcome(text, layout, context), 0.05)


def test_deep_context_changes_the_features(text: Any) -> None:
    layout = context_layout(text, ["cat", "dog"], "X X", 2, "end")
    context = draw((2, text.width))
    shallow = text.encode(layout, context)
    assert not torch.allclose(shallow, text.encode(layout, context, {2: draw((2, text.width), seed=3)}))
    assert_same((text.encode(layout, context, {}), []), (shallow, []), 0.0)


def test_fewer_deep_vectors_than_slots_keep_the_last_slots(text: Any) -> None:
    layout = context_layout(text, ["cat", "dog"], "X X X", 3, "end")
    context = draw((3, text.width))
    none = outcome(text, layout, context, {1: torch.zeros(0, text.width)})
    assert_same(none[:1] + ([none[1][0]],), outcome(text, layout, context), FLOAT32)
    _, (grad_context, grad_deep) = outcome(text, layout, context, {1: draw((1, text.width))})
    assert grad_deep.abs().sum() > 0
    assert (grad_context.abs().sum(dim=-1) > 0).all()  # the first slot still acts in layer 0


def test_chunk_size_follows_memory_by_default(text: Any) -> None:
    layout = context_layout(text, ["cat", "dog"], "X X", 2, "end")
    assert text.classes_per_chunk is None
    assert text._fitting_classes(layout) > 1000
    with torch.no_grad():
        assert text._fitting_classes(layout) > 1000


def test_plan_cached_in_evaluation_can_be_trained(text: Any) -> None:
    layout = context_layout(text, ["cat", "tabby cat"], "X X", 2, "end")
    with torch.inference_mode():
        text.encode(layout, draw((2, text.width)))
    _, (gradient,) = outcome(text, layout, draw((2, text.width)))
    assert gradient.abs().sum() > 0
