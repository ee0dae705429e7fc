"""Data sets whose domains are training and test data alike: what learns from the tested domain, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.datasets.layouts import write_layout
from vlprompt.config.run import RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets.catalogue import find_card
from vlprompt.errors import ConfigError
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
pytestmark = pytest.mark.filterwarnings("ignore:.*the card states")


@pytest.fixture
def office(tmp_path: Path) -> Path:
    write_layout(find_card("office31"), tmp_path)
    return tmp_path


def on_webcam(config: RunConfig, root: Path, **data: Any) -> RunConfig:
    return replace(config, data=replace(config.data, name="office31", root=str(root), target=("webcam",), **data))


@pytest.mark.parametrize("source", [(), ("amazon", "dslr")])
@pytest.mark.parametrize("method", ["tfup", "tfup_t"])
def test_tfup_needs_the_tested_domain_alone(
    method: str, source: tuple[str, ...], office: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published for Office-31 (TFUP: main.py): the images are those of the target, and no labelled one is read."""
    seen: set[str] = set()
    usual = FewShotData.view_features
    monkeypatch.setattr(
        FewShotData, "view_features", lambda data, split, *rest: seen.add(split) or usual(data, split, *rest)
    )
    own: dict[str, Any] = {"unlabelled": "test"}
    own |= {"views": 1, "training": {"epochs": 2}, "adaptation": {"warmup_epochs": 1}} if method == "tfup_t" else {}
    results = run(on_webcam(tiny(method, own), office, source=source)).results
    assert seen == {"test"} and results["test_images"] == "transductive"
    assert set(results["results"]["domains"]) == {"webcam"}
    assert bool(results["data"]["train"]) == bool(source) and results["data"]["test"] == 2 * 31


@pytest.mark.parametrize("method", ["tip_adapter", "clip_adapter", "tfup"])
def test_what_learns_from_training_images_needs_a_source(method: str, office: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=rf"{method} needs data.source, .* Domains: amazon, webcam, dslr"):
        run(on_webcam(tiny(method), office))
    run(on_webcam(tiny("zeroshot"), office))
