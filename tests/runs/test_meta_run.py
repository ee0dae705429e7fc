"""Meta-training as a command and in Python: kept, resumed bit for bit, the same on two processes, used downstream."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.processes import in_group, killed, run_script
from tests.fixtures.runs import ROOT
from vlprompt.backbone import load_backbone
from vlprompt.cli.main import main
from vlprompt.config.keys import to_yaml
from vlprompt.config.meta import MetaConfig, MetaRunConfig, TasksConfig
from vlprompt.config.run import BackboneConfig, RunConfig, TrainerConfig
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.meta_module import MetaModule
from vlprompt.errors import ConfigError, HeadError, NotFiniteError, VlpromptError
from vlprompt.io.regulators import REGULATOR_FILE
from vlprompt.runs.meta_run import CLUSTERS, host, meta_folder, meta_train
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
HOSTS: dict[str, dict[str, Any]] = {
    "coop": {"context_init": "an emoji of a"},
    "cocoop": {"context_init": "an emoji of a"},
    "vpt": {"image_tokens": 2, "image_depth": 1},
    "ivlp": {"context_init": "an emoji of a", "text_depth": 2, "image_tokens": 2, "image_depth": 2},
    "maple": {"context_init": "an emoji of a", "depth": 2},
    "mocoop": {
        "templates": ["an emoji of a {}.", "a cartoon {}."],
        "groups": [1, 1],
        "top_k": 1,
        "tune_layer_norms": True,
    },
}


def meta_config(output: Path, method: str = "coop", **values: Any) -> MetaRunConfig:
    own = {"steps": 4, "tasks_per_step": 2, "save_every": 2, "inner_lr": 0.02, "lr": 0.01, "regulator_lr": 0.01}
    return MetaRunConfig(
        method=method,
        settings=values.pop("settings", HOSTS[method]),
        backbone=BackboneConfig("demo", None),
        tasks=TasksConfig(topics=10, domains=4, least=8, support=5, query=4, **values.pop("tasks", {})),
        meta=MetaConfig(**{**own, **values}),
        trainer=TrainerConfig(accelerator="cpu", progress=False),
        output=str(output),
    )


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the metrics and every learned tensor of a meta-training."""
    tensors = load_file(folder / "head" / "head.safetensors")
    if (folder / REGULATOR_FILE).is_file():
        tensors |= load_file(folder / REGULATOR_FILE)
    return {"lines": read_metrics(folder / "metrics.jsonl")}, tensors


def same(one: Path, two: Path) -> None:
    (lines, tensors), (other_lines, others) = outcome(one), outcome(two)
    assert lines == other_lines and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def on_two_processes(config: Any, output: Path) -> Any:
    return dataclasses.replace(config, output=str(output), trainer=dataclasses.replace(config.trainer, devices=2))


def train_silently(config: RunConfig | MetaRunConfig) -> None:
    """Train, and return nothing: what is compared lies in the run's folder."""
    if isinstance(config, RunConfig):
        run(config)
    else:
        meta_train(config)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, cache: Any) -> Path:
    """The folder of a finished meta-training of CoOp."""
    folder, results = meta_train(meta_config(tmp_path_factory.mktemp("learned")))
    assert results["pairs"] == 1200 and results["last"]["train/query"] > 0
    assert "reconstruction" in results["what"]
    return folder


@pytest.mark.covering(rows="method")
@pytest.mark.parametrize("method", [name for name in HOSTS if name != "coop"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_every_host_by_the_same_code(method: str, order: str, tmp_path: Path, tiny: Tiny) -> None:
    more = {"regulator": "sigmoid-gate", "loss": "cross-entropy", "inner_steps": 2} if order == "second" else {}
    tasks = {"labels": "clusters", "classes": 3} if order == "second" else {}
    config = meta_config(tmp_path, method, order=order, steps=2, tasks_per_step=1, save_every=1, tasks=tasks, **more)
    start = host(config, load_backbone("demo"), ["one", "two"])
    folder, _ = meta_train(config)
    learned = load_file(folder / "head" / "head.safetensors")
    assert all(not torch.equal(learned[f"learnable.{name}"], value) for name, value in start.prompt_tensors())
    done = run(tiny(method, HOSTS[method], transform="random", epochs=1, init_from=f"gram:{folder}"))
    assert done.results["config"]["init_from"] == f"gram:{folder}"


@pytest.mark.parametrize(("part", "bias"), [("gate.weight", math.inf), ("gate.bias", 1.0)])
def test_a_value_that_is_not_finite_ends_a_meta_training(
    part: str, bias: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, check = meta_config(tmp_path, gate_bias=bias), MetaModule.on_train_epoch_end

    def spoiled(module: MetaModule) -> None:
        if module.current_epoch == 1:
            value = next(value for name, value in module.named_parameters() if part in name)
            value.data.view(-1)[0] = torch.nan
        check(module)

    monkeypatch.setattr(MetaModule, "on_train_epoch_end", spoiled)
    with pytest.raises(NotFiniteError, match=rf"epoch 1 of coop .*\n  - .*{part}: 1 of"):
        meta_train(config)
    kept = torch.load(meta_folder(config) / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0 and not any(bool(value.isnan().any()) for value in kept["state_dict"].values())
    assert not (meta_folder(config) / "head").exists() and not (meta_folder(config) / REGULATOR_FILE).exists()


def test_it_learns_and_is_reused(learned: Path, tmp_path: Path) -> None:
    config = meta_config(learned.parents[1])
    assert meta_folder(config) == learned
    folder, _ = meta_train(config)
    assert folder == learned and (learned / CLUSTERS).is_file()
    with pytest.raises(ConfigError, match="was started from another configuration"):
        meta_train(dataclasses.replace(config, seed=2))
    still, _ = meta_train(meta_config(tmp_path, lr=0.0, regulator_lr=0.0))
    moved, kept = outcome(learned)[1], outcome(still)[1]
    assert not torch.equal(moved["learnable.prompt.ctx"], kept["learnable.prompt.ctx"])
    assert not torch.equal(moved["gates.prompt-ctx.up.0"], kept["gates.prompt-ctx.up.0"])


def test_an_open_gate_trains_as_the_host_does(tmp_path: Path, tiny: Tiny) -> None:
    """Gate c = 1: the fine-tuning is the host's to the bit (3.g)."""
    folder, _ = meta_train(meta_config(tmp_path / "open", gate_bias=math.inf, regulator_lr=0.0))
    wanted = tiny(epochs=3, gradient_clip=0.1)
    regulated = run(dataclasses.replace(wanted, init_from=f"gram:{folder}"))
    plain = run(dataclasses.replace(wanted, init_from=str(folder)))
    tensors = [load_file(one.head_dir / "head.safetensors") for one in (regulated, plain)]
    assert regulated.folder != plain.folder
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    usual = load_file(run(wanted).head_dir / "head.safetensors")
    assert not torch.equal(usual["learnable.prompt.ctx"], tensors[1]["learnable.prompt.ctx"])


def test_the_regulator_bends_the_training(learned: Path, tiny: Tiny) -> None:
    tensors = []
    for more in ({"init_from": f"gram:{learned}"}, {"init_from": str(learned)}):
        tensors.append(load_file(run(tiny(epochs=2, lr=0.1, **more)).head_dir / "head.safetensors"))
    assert not torch.equal(tensors[0]["learnable.prompt.ctx"], tensors[1]["learnable.prompt.ctx"])


def test_accumulation_sees_the_whole_gradient(learned: Path, tiny: Tiny) -> None:
    """Two half batches and one whole batch are regulated alike: psi is not linear, so it must see the sum."""
    wanted = {"init_from": f"gram:{learned}", "epochs": 2, "lr": 0.1, "shots": 2}
    whole = run(tiny(batch_size=10, **wanted))
    halves = run(tiny(batch_size=5, accumulate=2, **wanted))
    a, b = (load_file(one.head_dir / "head.safetensors")["learnable.prompt.ctx"] for one in (whole, halves))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_regulated_training_in_mixed_precision(learned: Path, tiny: Tiny) -> None:
    done = run(tiny(init_from=f"gram:{learned}", epochs=1, lr=0.1, precision="bf16-mixed"))
    assert done.results["results"]["all"]["total"] == 13


def test_regulated_training_on_two_processes(learned: Path, tiny: Tiny, tmp_path: Path) -> None:
    wanted = tiny(init_from=f"gram:{learned}", epochs=2, lr=0.1, batch_size=4)
    one = run(wanted)
    in_group(2, train_silently, on_two_processes(wanted, tmp_path / "two"))
    two = next((tmp_path / "two").rglob("head.safetensors"))
    a, b = (load_file(file)["learnable.prompt.ctx"] for file in (one.head_dir / "head.safetensors", two))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"init_from": "gram:/nowhere"}, "nowhere"),
        ({"init_from": "runs/gram/x"}, "runs/gram/x"),
        ({"init_from": "gram:"}, "accepted: the folder of a run or head, or gram:RUN"),
    ],
)
def test_what_init_from_refuses(values: dict[str, str], says: str, tiny: Tiny) -> None:
    with pytest.raises(VlpromptError, match=says):
        run(tiny(**values))


def test_a_start_for_other_prompts_is_refused(learned: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="prompt.ctx: shape"):
        run(tiny(settings={"context_init": "", "context_length": 7}, init_from=f"gram:{learned}"))
    with pytest.raises(VlpromptError):
        run(tiny("zeroshot", init_from=f"gram:{learned}"))
    bare, _ = meta_train(meta_config(tmp_path, regulator="none"))
    with pytest.raises(HeadError, match="--init_from"):
        run(tiny(init_from=f"gram:{bare}"))
    run(tiny(epochs=1, init_from=str(bare)))


def test_a_damaged_regulator_is_refused(learned: Path, tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(learned, copy)
    path = copy / REGULATOR_FILE
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b"", b"\x80\x04."):
        path.write_bytes(broken)
        with pytest.raises(HeadError, match="damaged"):
            run(tiny(init_from=f"gram:{copy}"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "coop", "--settings.class_specific", "true", "--settings.context_init="], "class_specific"),
        (["--method", "zeroshot"], "takes no gradient steps"),
        (["--method", "coop", "--tasks.support", "300"], "tasks.support"),
        (["--method", "coop", "--meta.order", "third"], "'first' or 'second'"),
        (["--method", "coop", "--meta.steps", "7", "--meta.save_every", "2"], "meta.save_every"),
        (["--method", "coop", "--trainer.devices", "3"], "trainer.devices"),
        (["--method", "coop", "--pairs.source", "demo-pear"], "demo-pairs"),
        (["--method", "coop", "--pairs.sauce", "x"], "pairs.source"),
    ],
)
def test_problems_in_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = main(["meta-train", *words, "--backbone.name", "demo", "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert status == 2 and says in error and "Traceback" not in error


def test_the_page_of_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = meta_config(tmp_path)
    path = tmp_path / "meta.yaml"
    path.write_text(to_yaml(config))
    assert main(["meta-train", "--config", str(path), "--inspect"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.parent == meta_folder(config)
    text = page.read_text()
    assert "<html" in text.lower() and "data:image" in text
    assert not (page.parent / "head").exists()  # nothing was trained
    page.unlink()
    assert main(["meta-train", "--config", str(path), "--inspect", "--tasks.support", "300"]) == 2
    error = capsys.readouterr().err
    assert "No topic has two domains" in error and str(page) in error and page.is_file()


def test_meta_eval_prints_all_starts(
    learned: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "host.yaml"
    path.write_text(to_yaml(tiny(epochs=1)))
    words = ["meta-eval", str(learned), "--config", str(path), "--shots", "1,2", "--seeds", "1,2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("learned start, regulated") == 2 and "standard error" in out
    kept = json.loads(next((tmp_path / "runs").glob("meta-*.json")).read_text())
    cell = kept["cells"][1]
    assert (cell["start"], cell["shots"]) == ("usual start", 1)
    base = cell["base"]
    assert base["mean"] == pytest.approx(sum(base["per_seed"]) / 2)
    assert base["standard_error"] == pytest.approx(abs(base["per_seed"][0] - base["per_seed"][1]) / 2)
    assert main([*words, "--metrics", "ece,top5"]) == 0  # the runs are reused
    calibration, top = capsys.readouterr().out.split("top-5 accuracy in %")
    assert "expected calibration error in %" in calibration and calibration.count("│ -") and "│ -" not in top
    assert main([*words, "--metrics", "map"]) == 2 and "no map" in capsys.readouterr().err
    assert main(["meta-eval", str(learned), "--shots", "1"]) == 2


@pytest.mark.parametrize("method", ["coop", "ivlp"])
def test_killed_and_resumed_bit_for_bit(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = meta_config(tmp_path / "whole", method, steps=6, tasks_per_step=1, save_every=2)
    whole, _ = meta_train(config)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    folder = meta_folder(broken)
    path = tmp_path / "meta.yaml"
    path.write_text(to_yaml(broken))
    words = ["meta-train", "--config", str(path)]
    # Before the first checkpoint, after the second, and with everything but the results.
    for point in (("before", "last.ckpt", 1), ("after", "last.ckpt", 2), ("before", "results.json", 1)):
        killed(lambda: main(words), *point)
        assert not (folder / "results.json").exists()
    assert main(words) == 0
    assert f"--init_from gram:{folder}" in capsys.readouterr().out
    same(folder, whole)


@pytest.mark.covering(rows="method")
@pytest.mark.parametrize("method", ["coop", "ivlp"])
@pytest.mark.parametrize("start", ["forked", "command"])
def test_two_processes_learn_the_same(method: str, start: str, tmp_path: Path) -> None:
    config = meta_config(tmp_path / "one", method, steps=2, tasks_per_step=4)
    one, _ = meta_train(config)
    shared = on_two_processes(config, tmp_path / "two")
    if start == "forked":
        in_group(2, train_silently, shared)
    else:
        path = tmp_path / "meta.yaml"
        path.write_text(to_yaml(shared))
        done = run_script([sys.executable, str(ROOT / "tools" / "meta_train.py"), "--config", str(path)])
        assert done.returncode == 0, done.stderr
    (lines, tensors), (other_lines, others) = outcome(one), outcome(meta_folder(shared))
    for a, b in zip(lines["lines"], other_lines["lines"], strict=True):
        assert a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], rel=1e-5) for name in a)
    for name in tensors:
        torch.testing.assert_close(tensors[name], others[name], rtol=1e-4, atol=1e-5)


def test_a_host_with_a_decomposition_is_learned_and_used(tmp_path: Path, tiny: Tiny) -> None:
    """Its tensors are part of the start; the regulator is of the prompts alone."""
    own = {"dept_lowrank": {"rank": 3}}
    config = dataclasses.replace(meta_config(tmp_path, steps=2, tasks_per_step=1, save_every=1), decomposition=own)
    start = dict(host(config, load_backbone("demo"), ["one", "two"]).trainable_parameters())
    folder, _ = meta_train(config)
    learned = load_file(folder / "head" / "head.safetensors")
    assert not torch.equal(learned["learnable.decomposition.B"], start["decomposition.B"].detach())
    assert not [name for name in load_file(folder / REGULATOR_FILE) if "decomposition" in name]
    used = tiny("coop", settings=HOSTS["coop"], shots=1, output=str(tmp_path / "runs"))
    found = run(dataclasses.replace(used, init_from=f"gram:{folder}", decomposition=own))
    assert found.results["config"]["decomposition"]["dept_lowrank"]["rank"] == 3
    with pytest.raises(HeadError, match="decomposition.A: not a learnable"):
        run(dataclasses.replace(used, init_from=f"gram:{folder}"))
