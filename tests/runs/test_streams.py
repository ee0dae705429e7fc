"""Methods whose scores depend on the order of the test images: the order is drawn from the seed, kept and recorded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlprompt import create_method, list_methods
from vlprompt.backbone import Backbone
from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.protocols.compare import compare
from vlprompt.runs.dry_run import dry_run
from vlprompt.runs.predict import predict
from vlprompt.runs.run import evaluate_head, run
from vlprompt.runs.session import Session

Tiny = Callable[..., RunConfig]
ONLINE = ["tda"]
SMALL: dict[str, dict[str, Any]] = {"tda": {"positive_alpha": 5.0, "positive_capacity": 1}}


def order(config: RunConfig) -> list[int]:
    """Return the positions of the test images in the order in which the method of ``config`` sees them."""
    session = Session(config)
    data = session.data(session.method, session.task)
    data.setup("test")
    return [int(index) for batch in data.test_dataloader() for index in batch["index"]]


def test_these_are_all(tiny_backbone: Backbone) -> None:
    named = [name for name in list_methods() if create_method(name, tiny_backbone, ["cat", "dog"]).needs.online]
    assert named == ONLINE


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("name", ONLINE)
def test_the_seed_draws_the_order(name: str, views: int, tiny: Tiny) -> None:
    settings = SMALL[name] | {"crops": views}
    orders = {seed: order(tiny(name, settings, seed=seed)) for seed in (1, 2, 3)}
    listed = order(tiny(name, settings, order="file"))
    assert listed == list(range(13)) and all(sorted(one) == listed for one in orders.values())
    assert len({tuple(one) for one in (*orders.values(), listed)}) == 4
    assert order(tiny(name, settings, seed=2, test_batch_size=3)) == orders[2]


def test_images_of_other_methods_are_in_the_order_of_the_list(tiny: Tiny) -> None:
    assert order(tiny("zeroshot", seed=2)) == list(range(13))


@pytest.mark.parametrize("name", ONLINE)
def test_results_and_comparisons_name_the_order(name: str, tiny: Tiny) -> None:
    first, listed = run(tiny(name, SMALL[name])), run(tiny(name, SMALL[name], order="file"))
    kept = json.loads((Path(first.folder) / "results.json").read_text())
    assert kept["data"]["order"] == {"kind": "shuffled", "seed": 1}
    assert listed.results["data"]["order"] == {"kind": "file"} and listed.folder != first.folder
    assert any(line.startswith("order of the test images: ") for line in compare(first.folder, listed.folder).data)
    for done in (first, listed):
        again = evaluate_head(
            done.head_dir, Session(tiny(name, order=done.results["data"]["order"]["kind"])).config.data
        )
        assert again["correct"] == done.results["results"]["all"]["correct"]
        assert again["data"]["order"] == done.results["data"]["order"]
    assert "order" not in run(tiny("zeroshot")).results["data"]


@pytest.mark.parametrize("command", [run, dry_run])
def test_an_order_without_a_stream_is_refused(command: Callable[[RunConfig], object], tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="data.order is 'file', but the scores of coop do not depend on the order"):
        command(tiny("coop", order="file"))


@pytest.mark.parametrize("command", [run, dry_run])
def test_a_stream_is_not_shared_by_processes(command: Callable[[RunConfig], object], tiny: Tiny) -> None:
    config = tiny("tda", SMALL["tda"], batch_size=2)
    with pytest.raises(ConfigError, match="trainer.devices is 2, but tda sees its test images one after the other"):
        command(replace(config, trainer=replace(config.trainer, devices=2)))


@pytest.mark.parametrize("name", ONLINE)
def test_predictions_of_a_stream_say_that_the_order_counts(name: str, tiny: Tiny, tmp_path: Path) -> None:
    done = run(tiny(name, SMALL[name]))
    paths = [Path(str(getattr(sample.source, "path", ""))) for sample in Session(tiny(name, SMALL[name])).task.test[:3]]
    with pytest.warns(UserWarning, match=f"{name} adapts to the images before: these 3 images are one stream"):
        predict(done.head_dir, paths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(done.head_dir, paths[:1])
