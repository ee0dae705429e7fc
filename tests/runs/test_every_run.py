"""Whole runs of every method: trained and stopped halfway, resumed, saved, read back; and two processes."""

from __future__ import annotations

import json
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlprompt import list_methods, load_head
from vlprompt.config.run import RunConfig
from vlprompt.engine.module import PromptModule
from vlprompt.methods import get_method_class
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]
# Small where defaults are published sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "tip_adapter": {"views": 1},
    "tip_adapter_f": {"views": 1, "training": {"epochs": 2}},
    "ape": {"views": 1},
    "taskres": {"views": 1, "training": {"epochs": 2}},
    "lp_plus_plus": {"iterations": 20},
    "tpt": {"crops": 9},
    "difftpt": {"crops": 9, "generated": 0},
    "mta": {"crops": 9},
    "zero": {"crops": 9},
    "promptalign": {"crops": 9},
}


def configured(name: str, tiny: Tiny, output: Path) -> RunConfig:
    known = get_method_class(name).Settings.__dataclass_fields__
    own = {key: value for key, value in SETTINGS.get(name, {}).items() if key in known}
    return tiny(name, settings=own, epochs=2, shots=2, lr=0.01, output=str(output))


@pytest.mark.parametrize("name", list_methods())
def test_a_run_stopped_halfway_ends_as_if_it_had_not_been(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.simplefilter("ignore", UserWarning)
    whole = run(configured(name, tiny, tmp_path / "whole"))
    assert whole.results["results"] and whole.results["zeroshot"]
    head = load_head(whole.head_dir)
    assert head.method.name == name
    kept = load_file(whole.head_dir / "head.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())
    if not head.method.parameter_groups(0.1):
        assert run(configured(name, tiny, tmp_path / "whole")).reused
        return
    config, step = configured(name, tiny, tmp_path / "parts"), PromptModule.training_step

    def interrupted(module: PromptModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if module.current_epoch == 1:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(PromptModule, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(config)
    finally:
        signal.signal(signal.SIGINT, before)
    again = load_file(run(config).head_dir / "head.safetensors")
    assert again.keys() == kept.keys() and all(torch.equal(again[key], kept[key]) for key in kept)


# Every method with learnables in DistributedDataParallel as Lightning sets it up, without a search for unused
# parameters: an unused one ends the second step with an error. Gradients are the mean of both processes' own.
SCRIPT = """
import json, os, sys, warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vlprompt

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank = dist.get_rank()
backbone = vlprompt.load_backbone("demo")
names = ["grinning face", "red apple", "hot beverage"]
images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).chunk(2)
labels = torch.tensor([0, 1, 2, 0]).chunk(2)


class Loss(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, images, labels):
        return torch.stack(list(self.method.losses(images, labels).values())).sum()


# Each step draws anew, so what is drawn is off.
drawn = {"clip_lora": {"dropout": 0.0}, "ramt": {"gradient_dropout": False}}
for name in vlprompt.list_methods():
    torch.manual_seed(0)
    method = vlprompt.create_method(name, backbone, names, **drawn.get(name, {})).train()
    if not method.parameter_groups(0.1):
        continue
    alone = []
    for part in range(2):
        method.zero_grad()
        Loss(method)(images[part], labels[part]).backward()
        alone.append([p.grad.clone() for _, p in method.trainable_parameters()])
    method.zero_grad()
    both = DistributedDataParallel(Loss(method))
    worst = 0.0
    for step in range(2):
        method.zero_grad()
        both(images[rank], labels[rank]).backward()
        for (_, p), a, b in zip(method.trainable_parameters(), *alone):
            wanted = (a + b) / 2
            if not p.numel():
                continue
            worst = max(worst, float((p.grad - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)))
    if rank == 0:
        os.write(1, (json.dumps([name, worst]) + "\\n").encode())
# Gradient dropout draws alike in every process, for the gradient of all images.
found = []
for part in (slice(None), rank):
    torch.manual_seed(0)
    loss = Loss(vlprompt.create_method("ramt", backbone, names).train())
    given = (torch.cat(images), torch.cat(labels)) if part == slice(None) else (images[rank], labels[rank])
    (loss if part == slice(None) else DistributedDataParallel(loss))(*given).backward()
    found.append(torch.cat([p.grad.flatten() for _, p in loss.method.trainable_parameters()]))
if rank == 0:
    worst = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    os.write(1, (json.dumps(["draws", worst]) + "\\n").encode())
dist.destroy_process_group()
"""


def test_two_processes_share_every_gradient(tmp_path: Path, command: Callable[..., Any]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).parents[2])
    processes = [
        command(str(script), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=root)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    worst = dict(json.loads(line) for line in said[0][0].splitlines() if line.startswith("["))
    assert {"coop", "mocoop", "cocoop", "maple", "restore", "promptsrc", "prograd", "draws"} <= set(worst)
    assert max(worst.values()) < 1e-4, worst
