"""tools/build_demo.py: checks that need no full build."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from tests.fixtures.processes import run_script
from vlprompt.backbone import Backbone

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module", autouse=True)
def recipe():
    """Make the modules of tools/demo importable, as the tool does."""
    sys.path[:0] = [str(TOOLS / "demo"), str(TOOLS)]
    yield
    del sys.path[:2]


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The tool with a copy of the shipped files."""
    spec = importlib.util.spec_from_file_location("build_demo", TOOLS / "build_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for folder in ("demo", "demo_clip"):
        shutil.copytree(module.ASSETS / folder, tmp_path / folder)
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    return module


def test_check_passes_on_the_shipped_files():
    done = run_script([sys.executable, str(TOOLS / "build_demo.py"), "--check"])
    assert done.returncode == 0 and done.stdout.strip().endswith("0 problems"), done.stdout + done.stderr


def test_check_finds_every_change(tool, capsys):
    data = tool.ASSETS / "demo"
    flipped = bytearray((data / "openmoji.zip").read_bytes())
    flipped[1000] ^= 1
    (data / "openmoji.zip").write_bytes(flipped)
    (data / "pairs.jsonl").unlink()
    (data / "extra.txt").write_text("x")
    (data / "LICENCES.md").write_text((data / "LICENCES.md").read_text().replace("`noto`", "`nota`"))
    assert tool.check() == 1
    output = capsys.readouterr().out
    for name in ("openmoji.zip", "pairs.jsonl: missing", "extra.txt: not in", "does not name noto"):
        assert name in output


def emoji(sources, index, **changes):
    box = sources.Picture("<circle r='4'/>", 0, 0, 8, 8)
    styles = (*sources.TRAINING, *sources.HELD_OUT)
    facts = {
        "key": f"thing_{index:X}",
        "label": f"thing number {index}",
        "hexcode": f"{index:X}",
        "group": "objects",
        "subgroup": ("animal-bird", "food-fruit", "tool")[index % 3],
        "tags": ["thing", f"tag{index}"],
        "pictures": dict.fromkeys(styles, box),
    }
    return sources.Emoji(**{**facts, **changes})


def test_splits_share_no_drawing():
    import benchmarks
    import sources

    table = [emoji(sources, index, novel=index % 2 == 0) for index in range(140)]
    for split in (*(benchmarks.names_split(table, draw) for draw in (1, 2, 3)), benchmarks.kinds_split(table, True)):
        drawings = [{entry.partition("#")[0] for entry, _, _ in items} for items in split.values()]
        assert (
            all(drawings)
            and not drawings[0] & drawings[1]
            and not drawings[0] & drawings[2]
            and not drawings[1] & drawings[2]
        )
    first, second = benchmarks.names_split(table, 1), benchmarks.names_split(table, 2)
    assert first == benchmarks.names_split(table, 1) and first != second
    novel = {symbol.label: symbol.novel for symbol in table}
    names = list(dict.fromkeys(name for _, _, name in first["train"]))
    assert [novel[name] for name in names] == [False, True] * 50


def test_a_tenth_of_every_subgroup_is_novel():
    import sources

    table = [emoji(sources, index) for index in range(40)]
    chosen = sources._novel(table)
    assert len(chosen) == 3 and chosen == sources._novel(table)  # one of each kind, which have 14, 13 and 13
    assert not sources._novel([emoji(sources, index, subgroup="country-flag") for index in range(40)])
    assert sources.slug("O’Clock: “Café” & more!") == "oclock-cafe-and-more"


def test_icons_that_name_a_novel_thing_are_skipped(tmp_path):
    import sources

    body = {"body": "<path/>"}
    for style, endings in sources.ICONS.items():
        names = [f"{name}{ending}" for name in ("owl", "snowy-owl", "owlet", "cat-2") for ending in endings]
        folder = tmp_path / "@iconify-json" / style
        folder.mkdir(parents=True)
        (folder / "icons.json").write_text(json.dumps({"icons": {**dict.fromkeys(names, body), "owlet-thin": body}}))
    icons = sources.read_icons(tmp_path, [emoji(sources, 1, label="owl", novel=True), emoji(sources, 2, label="cat")])
    assert {icon.words for icon in icons if icon.style == "ph-fill"} == {"owlet", "cat"}
    assert {icon.words for icon in icons if icon.style == "game-icons"} == {"owlet", "cat", "owlet thin"}


def test_archives_depend_only_on_their_members():
    import packing

    archive = packing.archive({"b": b"2", "a": b"1"})
    assert archive == packing.archive({"a": b"1", "b": b"2"}) != packing.archive({"a": b"1", "b": b"3"})
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = (200, 30, 30, 255)
    assert packing.encoded(pixels) == packing.encoded(pixels.copy()) and packing.encoded(pixels)[8:12] == b"WEBP"


def test_compact_weights_are_restored():
    import packing

    from vlprompt.backbone.demo import full_state

    generator = torch.Generator().manual_seed(0)
    weights = {
        "visual.conv1.weight": torch.randn(8, 3, 4, 4, generator=generator),
        "token_embedding.weight": torch.randn(3, 192, generator=generator),
        "visual.ln.bias": torch.randn(5, generator=generator),
        "logit_scale": torch.tensor(3.0),
    }
    ids = torch.tensor([7, 400, 49407], dtype=torch.int32)
    state, trained = full_state({**packing.quantised(weights), "token_ids": ids})
    assert trained.tolist() == ids.tolist() and set(state) == set(weights)
    assert torch.equal(state["visual.ln.bias"], weights["visual.ln.bias"]) and state["logit_scale"] == 3
    table = state["token_embedding.weight"]
    assert table.shape == (49408, 192) and int(table.abs().sum(1).count_nonzero()) == 3
    for name, tensor in (("visual.conv1.weight", state["visual.conv1.weight"]), ("token_embedding.weight", table[ids])):
        rows = weights[name].flatten(1)
        assert ((tensor.flatten(1) - rows).abs() <= rows.abs().amax(1, keepdim=True) / 253).all()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """300 emoji, 100 icons, and a folder with noise in place of their drawings."""
    import sources

    folder = tmp_path_factory.mktemp("drawings")
    table = [emoji(sources, index, novel=index == 5) for index in range(300)]
    icons = [sources.Icon("flat-color-icons", f"icon {index}", table[0].pictures["noto"]) for index in range(100)]
    generator = np.random.default_rng(0)
    styles = (*sources.TRAINING, *(style + end for style, ends in sources.ICONS.items() for end in ends))
    for style in styles:
        keys = [symbol.key for symbol in table] if style in sources.TRAINING else [icon.words for icon in icons]
        pixels = generator.integers(0, 256, (len(keys), 64, 64, 4), dtype=np.uint8)
        np.savez(folder / f"{style}.npz", keys=json.dumps(keys), pixels=pixels)
    return folder, table, icons


def test_batches_depend_only_on_their_key(drawn):
    import training

    corpus = training.Corpus(*drawn)
    assert len(corpus.emoji) == 299 and not any(symbol.novel for symbol in corpus.emoji)
    first = corpus.batch("1 contrast 0")
    torch.rand(3), random.random(), np.random.rand(2)
    again, other = corpus.batch("1 contrast 0"), corpus.batch("1 contrast 1")
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    assert first.captions != other.captions and torch.isfinite(first.images).all()
    count = training.EMOJI_A_BATCH + training.ICONS_A_BATCH
    assert first.images.shape == (count, 3, 64, 64) and bool(first.same.diagonal().all())
    assert len(set(first.classes.tolist())) == count
    assert not any("thing number 5." in text or text.endswith("thing number 5") for text in first.captions)


def test_a_stopped_training_resumes_exactly(drawn, tmp_path, monkeypatch):
    import captions
    import training

    monkeypatch.setattr(training, "EMOJI_A_BATCH", 6)
    monkeypatch.setattr(training, "ICONS_A_BATCH", 2)
    monkeypatch.setattr(training, "KEEP_EVERY", 2)
    monkeypatch.setattr(training, "STEPS", {"contrast": 3, "distil": 3})
    corpus = training.Corpus(*drawn)
    vocabulary = captions.Vocabulary(drawn[1], [icon.words for icon in drawn[2]])
    vectors = torch.nn.functional.normalize(
        torch.randn(len(vocabulary.ids), 100, generator=torch.Generator().manual_seed(0)), dim=1
    )
    usual = training.Corpus.batch

    def run(folder, stop_at=None):
        def batch(self, key):
            if key == stop_at:
                raise KeyboardInterrupt
            return usual(self, key)

        monkeypatch.setattr(training.Corpus, "batch", batch)
        texts = training.train_contrast(folder, corpus, vocabulary, vectors, 1, lambda *_: None, torch.device("cpu"))
        student = training.train_distil(folder, corpus, texts, 1, lambda *_: None, torch.device("cpu"))
        return {**texts.state_dict(), **{f"vit.{key}": value for key, value in student.visual.state_dict().items()}}

    whole = run(tmp_path / "whole")
    for key in ("1 contrast 2", "1 distil 2"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop_at=key)
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and torch.isfinite(whole["map"]).all()


def test_networks_in_training_match_the_loaded_networks(drawn):
    import build_demo
    import captions
    import models
    import packing
    import views
    from safetensors.torch import load

    from vlprompt.backbone.demo import full_state

    vocabulary = captions.Vocabulary(drawn[1], [])
    count = len(vocabulary.ids)
    texts = models.Texts(models.build("demo-rn", count), vocabulary, torch.zeros(count, 100))
    texts.eval().requires_grad_(False)
    backbone = build_demo.resnet_of(texts, vocabulary.ids)
    prompts = ["a drawing of thing number 3, tag3", "an emoji of a bird."]
    features = torch.nn.functional.normalize(backbone.model.encode_text(open_clip.tokenize(prompts)), dim=-1)
    torch.testing.assert_close(features, texts(prompts), rtol=1e-4, atol=1e-5)
    pixels = torch.randint(256, (2, 64, 64, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = views.normalised(views.on_white(pixels))
    torch.testing.assert_close(backbone.encode_image(images), texts.network.visual(images), rtol=1e-4, atol=1e-5)
    # The shipped networks are the same up to 8-bit rounding.
    student = models.build("demo", count).eval()
    files = packing.weight_files(texts, student, vocabulary.ids)
    state = full_state(load(files["demo.safetensors"]))[0]
    shipped = Backbone.from_state_dict(state, quick_gelu=False, name="demo")
    close = torch.cosine_similarity(shipped.encode_image(images), student.visual(images))
    assert close.min() > 0.999 and json.loads(files["demo.json"])["model_cfg"]["vision_cfg"] == models.VISION["demo"]
    again = torch.cosine_similarity(shipped.model.encode_text(open_clip.tokenize(prompts)), features)
    assert again.min() > 0.999


def test_shipped_archives_hold_the_drawings_of_the_names():
    names = json.loads((TOOLS.parent / "vlprompt/assets/demo/names.json").read_text(encoding="utf-8"))
    known = {row["key"] for row in names}
    for style in ("fluent-emoji-flat", "openmoji", "streamline-emojis"):
        with zipfile.ZipFile(TOOLS.parent / f"vlprompt/assets/demo/{style}.zip") as file:
            keys = {name.removesuffix(".webp") for name in file.namelist() if name.endswith(".webp")}
        assert keys and keys <= known
    assert len(known) == len(names) and 100 < sum(row["novel"] for row in names) < 200
