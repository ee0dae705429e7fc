"""Shared by all tests: the miniature CLIP of ``tests/golden/tiny_clip.py`` and the archives computed with it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures.covering import left_out

GOLDEN = Path(__file__).parent / "golden"

# Tests must not reach for the network, nor find weights that happen to lie on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-pairs", action="store_true", help="run every pair of the tests that otherwise run a covering design"
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist keeps the order of pytest_collection_modifyitems
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what no covering design holds, unless all pairs are wanted or the command line names single ones.

    Workers of xdist take whole runs and commands first. A file of few long tests that comes last would keep one worker
    busy alone.
    """
    all_wanted = config.getoption("all_pairs") or any(word.endswith("]") for word in config.args)
    dropped = set() if all_wanted else set(left_out(items))
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.parent.name not in ("runs", "protocols", "tests"), -tests[item.path]))


@pytest.fixture(scope="session")
def tiny_clip() -> ModuleType:
    """The module ``tests/golden/tiny_clip.py``: ``TinyClipDims``, ``build_state_dict``, ``checksum``, ``draw``."""
    spec = importlib.util.spec_from_file_location("tiny_clip", GOLDEN / "tiny_clip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_clip"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_state_dict(tiny_clip: ModuleType) -> Callable[..., dict[str, torch.Tensor]]:
    """``tiny_state_dict(seed=0, archive_fields=False, **dims)``: fresh OpenAI-format tensors by the golden rule."""
    kept: dict[Any, dict[str, torch.Tensor]] = {}

    def build(seed: int = 0, archive_fields: bool = False, **dims: int) -> dict[str, torch.Tensor]:
        key = (seed, archive_fields, tuple(sorted(dims.items())))
        if key not in kept:
            sizes = tiny_clip.TinyClipDims(**dims)
            kept[key] = tiny_clip.build_state_dict(sizes, seed, archive_fields=archive_fields)
        return {name: tensor.clone() for name, tensor in kept[key].items()}

    return build


@pytest.fixture(scope="session")
def tiny_backbone(tiny_state_dict: Callable[..., dict[str, torch.Tensor]]) -> Any:
    """The miniature CLIP of the golden archives (default dimensions, seed 0) as a backbone. Frozen: share it."""
    from vlprompt.backbone import Backbone

    return Backbone.from_state_dict(tiny_state_dict(), name="tiny")


# Test images of each class by domain; training images are 3 a class in a, b and c, validation images 1.
TOY_TESTS = {"a": 3, "a+noise": 3, "a+blur": 3, "b": 1, "b+noise": 1, "c": 2, "c+noise": 2}
TOY_CLASSES = 4


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the same small images as ``styles`` and as ``plain``: ``<domain>/<split>/<class>/<n>.png``."""
    from PIL import Image, ImageOps

    from vlprompt.datasets import load_dataset

    # Domains are looks that the demo's CLIP finds unequally hard, so that their accuracies differ.
    looks: dict[str, Callable[[Any], Any]] = {
        "b": ImageOps.flip,
        "c": ImageOps.grayscale,
        "noise": ImageOps.invert,
        "blur": lambda picture: picture.resize((5, 5)).resize(picture.size),
    }
    root = tmp_path_factory.mktemp("toys")
    demo = load_dataset("demo", shots=1)
    for label in range(TOY_CLASSES):
        own = itertools.cycle([sample for sample in demo.test if sample.label == label])
        for domain, tests in TOY_TESTS.items():
            for split, count in ({"test": tests} if "+" in domain else {"train": 3, "val": 1, "test": tests}).items():
                for number in range(count):
                    picture: Image.Image = next(own).source.open()
                    for look in domain.split("+"):
                        picture = looks.get(look, lambda picture: picture)(picture)
                    for data in ("styles", "plain"):
                        place = root / data / domain / split / str(label) / f"{number}.png"
                        place.parent.mkdir(parents=True, exist_ok=True)
                        picture.save(place)
    return root


@pytest.fixture
def toy_sets(toy_images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of two data sets that are known in this test: ``toy-styles``, with domains, and ``toy-plain`` without.

    ``toy-styles`` has the clean domains a, b and c, each with a noisy version and a with a blurred one too, and names
    them in the order c, a, b. Both have 4 classes.
    """
    from vlprompt.datasets import Card, FileSource, Sample, SplitLists, load_dataset, readers
    from vlprompt.datasets import catalogue as cards
    from vlprompt.datasets.card import Classes, Templates
    from vlprompt.datasets.options import FolderOptions
    from vlprompt.datasets.report import Report

    names = load_dataset("demo", shots=1).class_names[:TOY_CLASSES]

    def read(card: Card, base: Path, report: Report) -> SplitLists:
        lists: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
        for path in sorted(base.rglob("*.png")):
            domain, split, label, _ = path.relative_to(base).parts
            own = domain if card.domains else ""
            entry = path.relative_to(base).as_posix()
            lists[split].append(Sample(entry, int(label), FileSource(str(path)), own))
        return SplitLists(names, **lists)

    def toy(name: str, folder: str, **facts: Any) -> Card:
        templates = Templates("an emoji of a {}.")
        return Card(name, "toy", FolderOptions(), Classes(), templates, folders=(folder,), **facts)

    styles = toy("toy-styles", "styles", domains={name: name for name in "cab"})
    plain = toy("toy-plain", "plain", aliases=("plainest",))
    known, usual = {**cards.all_cards(), styles.name: styles, plain.name: plain}, readers.reader
    monkeypatch.setattr(cards, "all_cards", lambda: known)
    monkeypatch.setattr(readers, "reader", lambda name: read if name == "toy" else usual(name))
    return toy_images


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """``golden("vpt")``: the arrays of ``tests/golden/vpt.npz`` as tensors, and its metadata."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            meta = json.loads(archive["meta"].item())
            arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        return arrays, meta

    return read


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``max|x - reference| / max|reference|``, the golden archives' measure."""

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        assert value.shape == reference.shape
        return float((value.detach() - reference).abs().max() / reference.abs().max())

    return error
