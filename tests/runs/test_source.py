"""PromptAlign's start and its source: trained prompts, and statistics of the images that these were trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fixtures.runs import tiny_run
from vlprompt import create_method, list_methods
from vlprompt.cli.main import main
from vlprompt.config.run import RunConfig
from vlprompt.data import test_transform as center
from vlprompt.errors import ConfigError, HeadError
from vlprompt.io import Head
from vlprompt.methods import get_method_class
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.plan import make_plan
from vlprompt.runs.dry_run import dry_run
from vlprompt.runs.run import Run, run, train
from vlprompt.runs.session import Session
from vlprompt.testtime.alignment import token_statistics

Tiny = Callable[..., RunConfig]
CROPS = {"crops": 1}


@pytest.fixture(scope="module")
def maple(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, which tests read."""
    place = tmp_path_factory.mktemp("maple")
    return run(tiny_run(image_folder, place, "maple", {"depth": 3}, epochs=1, transform="random"))


@pytest.fixture
def on_other_data(tiny: Tiny, toy_sets: Path, maple: Run, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """PromptAlign on ``toy-plain``, from prompts that were trained on ``folder``."""
    config = tiny("promptalign", CROPS, init_from=str(maple.folder))
    return config.with_data(name="toy-plain", root=str(toy_sets))


def expected(start: Run, run_config: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the statistics of all images that ``start`` was trained on, under the test transform."""
    trained_on: Any = Session(run_config)
    method: Any = start.head(trained_on.backbone).method
    transform = center(trained_on.backbone.preprocess)
    images = torch.stack([transform(sample.source.open()) for sample in trained_on.drawn.train])
    return token_statistics(trained_on.backbone.image, [images], method.prompts.tokens(), 2)


def statistics(done: Run) -> tuple[Tensor, Tensor]:
    state = done.head().method.trained_state()
    return state["source_mean"], state["source_variance"]


# -- trained prompts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in list_methods() if get_method_class(name).starts_from])
def test_a_method_that_starts_from_trained_prompts_refuses_others(
    name: str, tiny: Tiny, toy_sets: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = f"init_from is null, and {name} starts from trained prompts: give --init_from RUN, a run of"
    config = tiny(name, {"steps": 0})
    protocols: list[tuple[str, Any]] = [("few-shot", "same"), ("test-time", "test-time")]
    calls: list[Callable[[], Any]] = [lambda: run(config), lambda: dry_run(config)]
    calls += [lambda one=one: make_plan([config], [1], *one, dry=True) for one in protocols]  # type: ignore[misc]
    for call in calls:
        with pytest.raises(ConfigError, match=message):
            call()
    assert main(["train", "--config", f"{name}/demo", "--dry-run"]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    session = Session(replace(config, method="zeroshot", settings={}))
    method = create_method(name, session.backbone, session.drawn.class_names, **CROPS)
    with pytest.raises(ConfigError, match="and this one has random ones: load those of a head of"):
        train(method, session.drawn, output=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_these_are_all() -> None:
    assert [name for name in list_methods() if get_method_class(name).starts_from] == ["promptalign"]


# -- statistics -----------------------------------------------------------------------------------------------------
def test_the_source_is_what_the_prompts_were_trained_on(on_other_data: RunConfig, maple: Run, tiny: Tiny) -> None:
    own = run(tiny("promptalign", CROPS, init_from=str(maple.folder), seed=2, shots=1))  # other images of ``folder``
    assert own.results["source"] == {
        "statistics": "measured", "name": "folder", "classes": "all", "shots": 2, "seed": 1, "train": 10,
        "shots_sha256": maple.results["data"]["shots_sha256"],
    }  # fmt: skip
    torch.testing.assert_close(statistics(own), expected(maple, tiny("maple", {"depth": 3})), rtol=1e-4, atol=1e-5)
    # The folder is not at the root of the other data set, so its images cannot be loaded: the run is refused.
    with pytest.raises(ConfigError, match="(?s)'folder', which its prompts were trained on.* --data.statistics FILES"):
        run(on_other_data)
    kept = run(replace(on_other_data, init_from=str(own.folder)))
    assert kept.results["source"] == {"statistics": "head"}
    assert torch.equal(statistics(kept)[0], statistics(own)[0])
    again = run(replace(on_other_data, init_from=str(own.folder)))
    assert again.reused and again.results == kept.results


def test_the_source_is_loaded_from_its_own_data_set(tiny: Tiny, toy_sets: Path) -> None:
    styles = tiny("maple", {"depth": 3}, epochs=1, shots=1).with_data(name="toy-styles", root=str(toy_sets))
    trained = run(styles)
    config = tiny("promptalign", CROPS, init_from=str(trained.folder))
    runs: list[Run] = []
    source = config.with_data(name="toy-styles", root=str(toy_sets), shots=2)
    cross_dataset([source], ["toy-plain"], (1,), report=runs.append)
    assert [one.results["source"]["statistics"] for one in runs] == ["measured", "head"]
    alone = run(config.with_data(name="toy-plain", root=str(toy_sets)))
    assert alone.results["source"]["name"] == "toy-styles" and alone.results["source"]["shots"] == 1
    for done in (*runs, alone):
        torch.testing.assert_close(statistics(done), expected(trained, styles), rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_name_their_images(on_other_data: RunConfig, maple: Run, tmp_path: Path, tiny: Tiny) -> None:
    Head(maple.head().method).save_pretrained(tmp_path / "bare")
    without = run(tiny("promptalign", CROPS | {"alignment_weight": 0.0}, init_from=str(maple.folder)))
    assert "source" not in without.results
    for start, message in (
        (tmp_path / "bare", "whose head does not name the images that it was trained on"),
        (without.folder, "a head of promptalign without source statistics"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(replace(on_other_data, init_from=str(start)))
    deep = run(tiny("maple", {"depth": 2}, epochs=1))
    with pytest.raises(HeadError, match="do not fit the method 'promptalign'"):
        run(replace(on_other_data, init_from=str(deep.folder)))


# -- files ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Statistics in both formats, of more layers than are aligned."""
    mean, variance = torch.randn(6, 67, 192), torch.rand(6, 67, 192)
    torch.save(mean.half(), tmp_path / "means.pt")
    torch.save(variance, tmp_path / "vars.pt")
    save_file({"source_mean": mean, "source_variance": variance}, tmp_path / "both.safetensors")
    return {"mean": mean, "variance": variance, "pair": ("means.pt", "vars.pt"), "both": ("both.safetensors",)}


@pytest.mark.parametrize("form", ["pair", "both"])
def test_statistics_from_files(form: str, files: dict[str, Any], on_other_data: RunConfig, tmp_path: Path) -> None:
    names = tuple(str(tmp_path / name) for name in files[form])
    done = run(on_other_data.with_data(statistics=names))
    assert done.results["source"] == {"statistics": "files", "files": list(names)}
    mean, variance = statistics(done)
    assert torch.equal(variance, files["variance"][:2])
    torch.testing.assert_close(mean, files["mean"][:2], rtol=1e-3, atol=1e-3)
    torch.save(files["mean"] + 1, tmp_path / "means.pt")
    save_file({"source_mean": mean + 1, "source_variance": variance}, tmp_path / "both.safetensors")
    with pytest.raises(ConfigError, match="was started from another initial prompts"):
        run(on_other_data.with_data(statistics=names))


class Unsafe:
    """Something that only unpickling would build."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"PK", "is not a file of torch.save with one tensor"),
        (Unsafe(), "is not a file of torch.save with one tensor"),
        ([1.0], "holds a list as source_mean; accepted: a tensor"),
        (torch.zeros(2, 67, 192, dtype=torch.int64), "holds a Tensor as source_mean; accepted: a tensor .* of numbers"),
        (torch.zeros(2, 65, 192), r"shape \[2, 65, 192\]; accepted: at least 2 layers of 67 tokens of width 192"),
        (torch.zeros(1, 67, 192), "accepted: at least 2 layers"),
        (torch.full((2, 67, 192), float("nan")), "not finite"),
    ],
)
def test_files_that_hold_no_statistics(
    content: Any, message: str, files: dict[str, Any], on_other_data: RunConfig, tmp_path: Path
) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=f"data.statistics: .*{message}"):
        run(on_other_data.with_data(statistics=(str(path), str(tmp_path / "vars.pt"))))


def test_statistics_without_use_and_wrong_numbers_of_files(
    files: dict[str, Any], on_other_data: RunConfig, tiny: Tiny, tmp_path: Path
) -> None:
    both = (str(tmp_path / "both.safetensors"),)
    save_file({"source_mean": files["mean"]}, tmp_path / "half.safetensors")
    for config, message in (
        (tiny("coop", statistics=both), "but coop with these settings aligns with no source; omit data.statistics"),
        (replace(on_other_data, settings={"steps": 0}).with_data(statistics=both), "aligns with no source"),
        (on_other_data.with_data(statistics=both * 3), "data.statistics names 3 files; accepted: one safetensors"),
        (on_other_data.with_data(statistics=(str(tmp_path / "half.safetensors"),)), "nothing as source_variance"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(config)
