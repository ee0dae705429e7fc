"""Whole runs of every method: kept and reused, stopped halfway and resumed, read back; gradients of two processes."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.fixtures.processes import in_group
from tests.fixtures.runs import tiny_run
from vlprompt import create_method, list_methods, load_head
from vlprompt.backbone import Backbone
from vlprompt.config.run import RunConfig
from vlprompt.engine.module import PromptModule
from vlprompt.methods import PromptMethod, get_method_class
from vlprompt.runs.run import Run, run

NAMES = ["grinning face", "red apple", "hot beverage"]
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
    "promptalign": {"crops": 9, "depth": 9},
}


def configured(name: str, image_folder: Path, output: Path) -> RunConfig:
    kind = get_method_class(name)
    own = {key: value for key, value in SETTINGS.get(name, {}).items() if key in kind.Settings.__dataclass_fields__}
    start = None if kind.starts_from is None else run(configured(kind.starts_from, image_folder, output))
    given = {} if start is None else {"init_from": str(start.folder)}
    return tiny_run(image_folder, output, name, settings=own, epochs=2, shots=2, lr=0.01, **given)


@pytest.fixture(scope="module")
def whole(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """``whole("coop")``: a run that nothing interrupts, the same one whenever a test asks for it."""
    output = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(name: str) -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return run(configured(name, image_folder, output))

    return of


@pytest.mark.parametrize("name", list_methods())
def test_a_run_is_kept_and_reused(name: str, whole: Callable[[str], Run], image_folder: Path) -> None:
    done = whole(name)
    assert done.results["results"] and done.results["zeroshot"] and not done.reused
    assert load_head(done.head_dir).method.name == name
    kept = load_file(done.head_dir / "head.safetensors")
    assert kept and all(bool(value.isfinite().all()) for value in kept.values())
    again = run(configured(name, image_folder, Path(done.folder).parents[2]))
    assert again.reused and again.results == done.results


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list_methods())
def test_a_run_stopped_halfway_ends_as_if_it_had_not_been(
    name: str, whole: Callable[[str], Run], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = whole(name)
    if not done.results["train"]["epochs"]:
        pytest.skip(f"{name} takes no gradient steps")
    config, step = configured(name, image_folder, tmp_path), PromptModule.training_step

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
    kept = load_file(done.head_dir / "head.safetensors")
    again = load_file(run(config).head_dir / "head.safetensors")
    assert again.keys() == kept.keys() and all(torch.equal(again[key], kept[key]) for key in kept)


# -- two processes ----------------------------------------------------------------------------------------------------
class Loss(torch.nn.Module):
    def __init__(self, method: PromptMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(list(self.method.losses(images, labels).values())).sum()


#: Every step draws, so random parts are turned off.
NOT_DRAWN: dict[str, dict[str, Any]] = {"clip_lora": {"dropout": 0.0}, "ramt": {"gradient_dropout": None}}


def worst_gradients(backbone: Backbone) -> dict[str, float]:
    """Return how far gradients of two processes are from the mean of both processes' own, by method.

    Methods are in DistributedDataParallel as Lightning sets it up, without a search for unused parameters: an unused
    one ends the second step with an error.
    """
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).chunk(2)
    labels = torch.tensor([0, 1, 2, 0]).chunk(2)
    worst = {}
    for name in list_methods():
        torch.manual_seed(0)
        method = create_method(name, backbone, NAMES, **NOT_DRAWN.get(name, {})).train()
        if not method.parameter_groups(0.1):
            continue
        alone = []
        for part in range(2):
            method.zero_grad()
            Loss(method)(images[part], labels[part]).backward()
            alone.append([p.grad.clone() for _, p in method.trainable_parameters()])  # type: ignore[union-attr]
        both = DistributedDataParallel(Loss(method))
        worst[name] = 0.0
        for _ in range(2):
            method.zero_grad()
            both(images[rank], labels[rank]).backward()
            for (_, p), a, b in zip(method.trainable_parameters(), *alone, strict=True):
                worst[name] = max(worst[name], relative(p.grad, (a + b) / 2))
    # Gradient dropout draws alike in every process, for the gradient of all images.
    gradients = []
    for shared in (False, True):
        torch.manual_seed(0)
        loss = Loss(create_method("ramt", backbone, NAMES).train())
        given = (images[rank], labels[rank]) if shared else (torch.cat(images), torch.cat(labels))
        (DistributedDataParallel(loss) if shared else loss)(*given).backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in loss.method.trainable_parameters()]))  # type: ignore[union-attr]
    worst["draws"] = relative(gradients[1], gradients[0])
    return worst


def relative(value: Tensor | None, wanted: Tensor) -> float:
    assert value is not None and value.shape == wanted.shape
    return float((value - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)) if wanted.numel() else 0.0


def test_two_processes_share_every_gradient(tiny_backbone: Backbone) -> None:
    worst, _ = in_group(2, worst_gradients, tiny_backbone)
    assert worst.pop("draws") < 1e-3  # sums of four images against sums of two; other draws would differ by much more
    assert {"coop", "mocoop", "cocoop", "maple", "restore", "promptsrc", "prograd"} <= set(worst)
    assert max(worst.values()) < 1e-4, worst
