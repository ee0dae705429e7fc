"""TDA's caches compared with plain lists that process one image at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlprompt.errors import HeadError
from vlprompt.testtime import tda
from vlprompt.testtime.tda import NegativeCache, PositiveCache, Summary, TDAStream, summarise

FIELDS = ("features", "logits", "probabilities", "entropies", "predictions")


def stream_of(seed: int, images: int, classes: int, width: int = 16, views: int = 1) -> tuple[Summary, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(classes, width, generator=generator), dim=-1)
    labels = torch.randint(classes, (images,), generator=generator)
    noise = F.normalize(torch.randn(images, views, width, generator=generator), dim=-1)
    unit = F.normalize(text[labels][:, None] * 0.4 + noise, dim=-1)
    return summarise(unit, text, 10.0, 0.3), text


def images_of(summary: Summary, start: int, stop: int) -> Summary:
    return Summary(*(getattr(summary, name)[start:stop] for name in FIELDS))


def with_lists(
    summary: Summary, positive: PositiveCache | None, negative: NegativeCache | None
) -> tuple[Tensor, list[dict[int, list[int]]]]:
    """Reference with a list of items per class for each cache, one image at a time."""
    classes, rows = summary.logits.shape[1], []
    caches: list[dict[int, list[tuple[float, int]]]] = [{}, {}]
    for t in range(len(summary.features)):
        entropy, c = float(summary.entropies[t]), int(summary.predictions[t])
        gate = entropy / math.log2(classes) if classes > 1 else 0.0
        enters = [positive is not None, negative is not None and negative.entropy[0] < gate < negative.entropy[1]]
        for options, cache, enter in zip((positive, negative), caches, enters, strict=True):
            items = cache.setdefault(c, [])
            if options is None or not enter:
                continue
            if len(items) < options.capacity:
                items.append((entropy, t))
            elif entropy < items[-1][0]:
                items[-1] = (entropy, t)
            items.sort(key=lambda item: item[0])
        row = summary.logits[t].clone()
        if positive is not None:
            for label, items in caches[0].items():
                for _, i in items:
                    weight = (-positive.beta * (1 - summary.features[t] @ summary.features[i])).exp()
                    row[label] += positive.alpha * weight
        if negative is not None:
            for items in caches[1].values():
                for _, i in items:
                    weight = (-negative.beta * (1 - summary.features[t] @ summary.features[i])).exp()
                    mask = (summary.probabilities[i] > negative.mask[0]) & (summary.probabilities[i] < negative.mask[1])
                    row = row - negative.alpha * weight * mask
        rows.append(row)
    return torch.stack(rows), [{c: [i for _, i in items] for c, items in cache.items() if items} for cache in caches]


def held(stream: TDAStream, name: str) -> dict[int, list[int]]:
    rows = stream.slots[name].index.tolist()
    return {c: [i for i in row if i >= 0] for c, row in enumerate(rows) if row[0] >= 0}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_blocks_equal_the_lists_of_the_reference(
    seed: int, images: int, classes: int, capacity: int, few: int, views: int
) -> None:
    summary, _ = stream_of(seed, images, classes, views=views)
    positive = PositiveCache(capacity, 1.5, 4.0)
    negative = NegativeCache(few, 0.3, 2.0, (0.05, 0.6), (0.03, 0.9))
    expected, caches = with_lists(summary, positive, negative)
    stream = TDAStream(classes, 16, positive, negative)
    torch.testing.assert_close(stream.score(summary).logits, expected, rtol=1e-4, atol=1e-4)
    assert [held(stream, "positive"), held(stream, "negative")] == caches
    assert stream.seen == images


@pytest.mark.parametrize("cuts", [[1] * 50, [7, 20, 23], [0, 49, 1]])
def test_block_boundaries_do_not_matter(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    summary, _ = stream_of(3, 50, 5)
    whole = TDAStream(5, 16)
    expected = whole.score(summary).logits
    monkeypatch.setattr(tda, "_BLOCK", 8)
    stream, rows, start = TDAStream(5, 16), [], 0
    for count in cuts:
        rows.append(stream.score(images_of(summary, start, start + count)).logits)
        start += count
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, whole.state()[name]) for name, value in stream.state().items())


def test_a_stream_can_be_saved_and_continued(tmp_path: Path) -> None:
    summary, _ = stream_of(4, 40, 5)
    whole = TDAStream(5, 16).score(summary).logits
    first = TDAStream(5, 16)
    first.score(images_of(summary, 0, 25))
    save_file(first.state(), tmp_path / "stream.safetensors")
    second = TDAStream(5, 16)
    second.load_state(load_file(tmp_path / "stream.safetensors"))
    torch.testing.assert_close(second.score(images_of(summary, 25, 40)).logits, whole[25:], rtol=1e-5, atol=1e-5)
    # The loaded state is a copy, so the first stream is unchanged.
    assert first.seen == 25 and second.seen == 40
    with pytest.raises(HeadError, match="positive.keys"):
        TDAStream(6, 16).load_state(first.state())
    with pytest.raises(HeadError, match="negative.index: unknown"):
        TDAStream(5, 16, negative=None).load_state(first.state())


def test_disabled_caches_and_zero_weights_are_zero_shot() -> None:
    summary, _ = stream_of(5, 30, 4)
    assert torch.equal(TDAStream(4, 16, None, None).score(summary).logits, summary.logits)
    silent = TDAStream(4, 16, PositiveCache(alpha=0.0), NegativeCache(alpha=0.0))
    assert torch.equal(silent.score(summary).logits, summary.logits)
    empty_mask = TDAStream(4, 16, PositiveCache(), NegativeCache(mask=(1.0, 1.0))).score(summary)
    assert torch.equal(empty_mask.logits, TDAStream(4, 16, PositiveCache(), None).score(summary).logits)


def test_the_first_image_enters_before_it_is_scored() -> None:
    summary, _ = stream_of(6, 1, 4)
    scored = TDAStream(4, 16, PositiveCache(alpha=2.0), None).score(summary)
    expected = summary.logits + 2.0 * F.one_hot(summary.predictions, 4)
    torch.testing.assert_close(scored.logits, expected)


def test_copies_of_one_image_fill_its_class_without_replacement() -> None:
    summary, _ = stream_of(7, 1, 4)
    copies = Summary(*(getattr(summary, name).repeat_interleave(6, dim=0) for name in FIELDS))
    stream = TDAStream(4, 16)
    scored = stream.score(copies)
    assert held(stream, "positive") == {int(summary.predictions[0]): [0, 1, 2]}  # equal entropies do not replace
    assert (scored.logits.argmax(dim=1) == summary.predictions).all()


def test_permuting_classes_permutes_logits() -> None:
    generator = torch.Generator().manual_seed(8)
    text = F.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    views = F.normalize(torch.randn(40, 1, 16, generator=generator), dim=-1)
    order = torch.randperm(5, generator=generator)
    plain = TDAStream(5, 16).score(summarise(views, text, 10.0)).logits
    moved = TDAStream(5, 16).score(summarise(views, text[order], 10.0)).logits
    torch.testing.assert_close(moved, plain[:, order], rtol=1e-5, atol=1e-5)


def test_several_views_are_averaged_without_normalisation() -> None:
    generator = torch.Generator().manual_seed(9)
    text = F.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    views = F.normalize(torch.randn(3, 10, 16, generator=generator), dim=-1)
    summary = summarise(views, text, 10.0, 0.4)
    assert bool((summary.features.norm(dim=-1) < 0.99).all())
    p = summary.probabilities
    torch.testing.assert_close(p.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(summary.entropies, -(p * p.log()).sum(dim=1), rtol=1e-4, atol=1e-5)


def test_no_images_do_not_change_the_caches() -> None:
    summary, _ = stream_of(10, 5, 4)
    stream = TDAStream(4, 16)
    assert stream.score(images_of(summary, 0, 0)).logits.shape == (0, 4)
    assert stream.seen == 0 and not held(stream, "positive")
