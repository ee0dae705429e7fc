"""Features of pairs: every image and caption is encoded once, in blocks, and reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt.data import FeatureStore
from vlprompt.data import test_transform as clip_transform
from vlprompt.data.tally import tally
from vlprompt.datasets import FileSource
from vlprompt.errors import ConfigError, DataError
from vlprompt.pairs import Pair, caption_features, image_features, load_pairs
from vlprompt.pairs import features as pair_features


class Images:
    """An image encoder that counts images."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return images.flatten(1)[:, :5] * 2


class Texts:
    """A text encoder that counts captions; features are length and first letter."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.calls.append(len(texts))
        return torch.tensor([[len(text), ord(text[0])] for text in texts], dtype=torch.float64)


@pytest.fixture
def pairs(tmp_path: Path, paint: Callable[..., Path]) -> list[Pair]:
    """Seven pairs of five images: the third has three captions."""
    sources = [FileSource(str(paint(tmp_path / "images" / f"{n}.png", n))) for n in range(5)]
    return [Pair(f"{n}.png", f"{n} caption {i}", sources[n]) for i, n in enumerate([0, 2, 1, 2, 3, 4, 2])]


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_features, "BLOCK_ITEMS", 2)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_encoded_once(workers: int, pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    encode, store = Images(), FeatureStore(tmp_path / "store")
    rows = image_features(pairs, preprocess, encode, fingerprint="f", store=store, batch_size=3, workers=workers)
    transform = clip_transform(preprocess)
    expected = torch.stack([transform(pair.source.open()).flatten()[:5] * 2 for pair in pairs])
    assert torch.equal(rows.features, expected) and rows.features.dtype == torch.float32 and rows.missing == ()
    assert encode.count == store.encoded == 5 and len(entries(tmp_path / "store")) == 3
    again = FeatureStore(tmp_path / "store")
    with tally() as counts:
        stored = image_features(pairs, preprocess, encode, fingerprint="f", store=again)
    assert torch.equal(stored.features, expected)
    assert (encode.count, again.encoded, counts.encoded) == (5, 0, 0)
    # A longer list shares the first blocks.
    longer = [*pairs[:5], Pair("new.png", "new", pairs[0].source)]
    image_features(longer, preprocess, encode, fingerprint="f", store=again)
    assert again.encoded == 1


def test_what_features_depend_on(pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    encode, store = Images(), FeatureStore(tmp_path / "store")

    def computed(**changes: Any) -> int:
        before = encode.count
        facts = {"pairs": pairs[:3], "preprocess": preprocess, "fingerprint": "f", **changes}
        image_features(facts.pop("pairs"), facts.pop("preprocess"), encode, store=store, **facts)
        return encode.count - before

    assert computed() == 3 and computed() == 0 and computed(batch_size=1, workers=1) == 0
    assert computed(fingerprint="g") == 3
    assert computed(preprocess=replace(preprocess, size=8)) == 3
    assert computed(pairs=[replace(pair, caption="other", domain="d") for pair in pairs[:3]]) == 0
    source = pairs[0].source
    assert isinstance(source, FileSource)
    Path(source.path).write_bytes(Path(pairs[1].source.path).read_bytes())
    assert computed() == 2, "only the block with the changed image"
    assert all(
        '"split":"images"' in path.read_bytes().decode("latin-1").replace("\\", "") for path in entries(store.folder)
    )


def test_a_damaged_or_lost_block_is_computed_again(pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    encode, texts, folder = Images(), Texts(), tmp_path / "store"
    captions = [pair.caption for pair in pairs]

    def both() -> tuple[Tensor, Tensor]:
        images = image_features(pairs, preprocess, encode, fingerprint="f", store=folder)
        return images.features.clone(), caption_features(captions, texts, fingerprint="f", store=folder)

    first = both()
    assert encode.count == 5 and sum(texts.calls) == 7 and len(entries(folder)) == 3 + 4
    for path in entries(folder):
        before = encode.count + sum(texts.calls)
        data = path.read_bytes()
        path.unlink()  # a memory map of the old file must not see the change
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.warns(UserWarning, match="damaged.* computed again"):
            again = both()
        assert all(map(torch.equal, again, first)) and encode.count + sum(texts.calls) - before in (1, 2)
        path.unlink()
        assert all(map(torch.equal, both(), first))


def test_a_killed_run_resumes(pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    class Stops(Images):
        def __call__(self, images: Tensor) -> Tensor:
            if self.count >= 4:
                raise KeyboardInterrupt
            return super().__call__(images)

    encode = Images()
    with pytest.raises(KeyboardInterrupt):
        image_features(pairs, preprocess, Stops(), fingerprint="f", store=tmp_path / "store")
    image_features(pairs, preprocess, encode, fingerprint="f", store=tmp_path / "store")
    assert encode.count == 1


def test_images_that_cannot_be_read(pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    bad = [Pair("bad.png", "x", FileSource(str(tmp_path / "bad.png"))), Pair("no.png", "x", FileSource("/no.png"))]
    mixed = [pairs[0], bad[0], pairs[1], pairs[2], bad[0], bad[1]]  # the last block has no readable image
    encode, store = Images(), FeatureStore(tmp_path / "store")

    def features_of(chosen: list[Pair], **named: Any) -> Any:
        return image_features(chosen, preprocess, encode, fingerprint="f", store=store, **named)

    with pytest.raises(DataError, match="bad.png cannot be decoded"):
        features_of(mixed[:4])
    with pytest.raises(DataError, match="/no.png cannot be read"):
        features_of([pairs[0], bad[1]])
    encode.count = 0
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"skipped: 2 \(bad.png, no.png\)"), tally() as counts:
            rows = features_of(mixed, skip=True)
        assert rows.missing == (1, 4, 5) and rows.features.shape == (6, 5)
        assert not rows.features[[1, 4, 5]].any() and rows.features[[0, 2, 3]].any(1).all()
        assert list(counts.skipped["train"]) == ["bad.png", "no.png"] and encode.count == 3
    with pytest.raises(DataError, match="bad.png cannot be decoded"):
        features_of(mixed[:4])  # skipped before, an error without skip
    with pytest.raises(DataError, match="None of the 2 images can be read"):
        features_of(bad, skip=True)


def test_captions(tmp_path: Path) -> None:
    encode, store = Texts(), FeatureStore(tmp_path)
    captions = ["bb", "a", "bb", "\ud800c", "a\nd", "e", "a"]
    features = caption_features(captions, encode, fingerprint="f", store=store, batch_size=1)
    assert features.tolist() == [[len(text), ord(text[0])] for text in captions] and features.dtype == torch.float32
    assert encode.calls == [1] * 5
    assert torch.equal(caption_features(captions, encode, fingerprint="f", store=tmp_path), features)
    assert len(encode.calls) == 5
    # Line ends in captions do not make two lists equal.
    assert caption_features(["a", "d\nb"], encode, fingerprint="f", store=store)[1].tolist() == [3, ord("d")]
    assert caption_features(["a\nd", "b"], encode, fingerprint="f", store=store)[0].tolist() == [3, ord("a")]
    assert encode.calls[5:] == [2, 2]
    caption_features(captions[:2], encode, fingerprint="g", store=store)
    assert encode.calls[7:] == [2]


def test_no_gradient_is_kept(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    features = caption_features(["a", "b"], lambda texts: weight.repeat(len(texts), 1), fingerprint="f", store=tmp_path)
    assert not features.requires_grad and features.grad_fn is None


def test_refused_arguments(pairs: list[Pair], tmp_path: Path, preprocess: Any) -> None:
    with pytest.raises(ConfigError, match="fingerprint"):
        image_features(pairs, preprocess, Images(), fingerprint="", store=tmp_path)
    with pytest.raises(ConfigError, match="batch_size is 0; accepted: whole numbers from 1"):
        caption_features(["a"], Texts(), fingerprint="f", store=tmp_path, batch_size=0)
    for wrong in (torch.zeros(3, 2), torch.zeros(2)):
        with pytest.raises(ConfigError, match=r"encode_text returned \(.*\) for 2 captions; accepted: \[n, D\]"):
            caption_features(["a", "b"], lambda _, wrong=wrong: wrong, fingerprint="f", store=tmp_path)
    with pytest.raises(DataError, match="There are no images to compute features of"):
        image_features([], preprocess, Images(), fingerprint="f", store=tmp_path)
    with pytest.raises(DataError, match="There are no captions to compute features of"):
        caption_features([], Texts(), fingerprint="f", store=tmp_path)


def test_the_demo_pairs_in_the_default_store(tmp_path: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(pair_features, "BLOCK_ITEMS", 10_000)
    encode, pairs = Images(), load_pairs()[:30]
    first = image_features(pairs, preprocess, encode, fingerprint="f")
    assert torch.equal(image_features(pairs, preprocess, encode, fingerprint="f").features, first.features)
    assert encode.count == 30 and len(entries(tmp_path / "features")) == 1
