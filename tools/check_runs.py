"""Compare trainings of vlprompt with whole trainings of the official trainers.

Run: python tools/check_runs.py tests/golden_runs/*.npz [--tol 1e-4] [--steps N]

Only the format of an archive is assumed (tests/golden_runs/README.md). Method, settings, backbone, data, seed and
recipe come from its ``meta``, and the run is the one of ``vlprompt train`` with them. Only three things are set: the
start tensors, the order of the training images, and a callback that records loss and learning rates of every step.

The output lists the largest error of the losses and rates (relative to the value of the step) and of every tensor at
the end (``max|x - ref| / max|ref|``), and the test images that are right. The exit status is 1 if an error is above
``--tol``, if another number of images is right, or if an array of the archive was not compared. ``--steps`` stops after
N steps and compares only these.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from check_golden import read_archive, relative_error  # noqa: E402

from vlprompt.cli.parse import parse_run  # noqa: E402
from vlprompt.config.hints import field_hints, options  # noqa: E402
from vlprompt.config.keys import merged, nest  # noqa: E402
from vlprompt.config.run import RunConfig  # noqa: E402
from vlprompt.data import FewShotData  # noqa: E402
from vlprompt.datasets import FewShotTask  # noqa: E402
from vlprompt.engine.fit import quiet  # noqa: E402
from vlprompt.errors import ConfigError, VlpromptError  # noqa: E402
from vlprompt.methods import PromptMethod, get_method_class  # noqa: E402
from vlprompt.methods.fitted import FittedMethod  # noqa: E402
from vlprompt.runs.run import run_session  # noqa: E402
from vlprompt.runs.session import Session  # noqa: E402

CORRECT = {f"{classes}_correct": classes for classes in ("base", "all", "new")}
SECTIONS = ("method", "settings", "objectives", "decomposition", "backbone", "data", "recipe", "trainer", "seed")
DESCRIPTION = ("kind", "source", "patched", "names", "order")
FLOOR = 0.01
"""Share of the largest loss of a run below which a loss, a difference of logits, is mostly rounding."""


class Archive:
    """One archive: its metadata, start and end tensors, losses, rates and orders."""

    def __init__(self, path: Path) -> None:
        self.meta, arrays = read_archive(path)
        missing = [name for name in ("losses", "rates", "order") if name not in arrays]
        if missing:
            raise ConfigError(f"it has no {', '.join(missing)}")
        self.losses, self.rates, self.order = (arrays.pop(name) for name in ("losses", "rates", "order"))
        self.start, self.end = (
            {
                name.removeprefix(part): torch.from_numpy(arrays.pop(name))
                for name in list(arrays)
                if name.startswith(part)
            }
            for part in ("start/", "end/")
        )
        self.unread = [*arrays, *(name for name in self.meta if name not in (*SECTIONS, *CORRECT, *DESCRIPTION))]

    def config(self, output: str) -> RunConfig:
        """Return the configuration of the run that the archive describes, with results in the folder ``output``.

        Raises:
            ConfigError: Values are not accepted.
        """
        given = {name: self.meta[name] for name in SECTIONS if name in self.meta}
        if isinstance(given.get("backbone"), str):
            given["backbone"] = {"name": given["backbone"]}
        data = dict(given.get("data", {}))
        if "view" in data:
            data["transform"] = data.pop("view")
        recipe = dict(given.get("recipe", {}))
        if "batch_size" in recipe:  # the order has an incomplete last batch, or not
            recipe.setdefault("drop_last", self.order.shape[-1] % recipe["batch_size"] == 0)
        given["settings"] = present_settings(given["method"], given.get("settings", {}))
        trainer = {"accelerator": "cpu", "progress": False, **given.get("trainer", {})}
        file = Path(output) / "archive.json"  # JSON is YAML
        file.write_text(
            json.dumps({**given, "data": data, "recipe": recipe, "trainer": trainer, "output": output}),
            encoding="utf-8",
        )
        return parse_run(["--config", str(file)])


def present_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` under the names that the method has for them today.

    Former names are those of the method's ``renamed``. A former switch of what is a table of settings today is the
    table with its defaults, or null.
    """
    kind = get_method_class(method).Settings
    hints, renamed = field_hints(kind), getattr(kind, "renamed", {})
    present: dict[str, Any] = {}
    off = []
    for name, value in settings.items():
        key = name if name in hints else renamed.get(name, name).partition(" ")[0]
        table = any(dataclasses.is_dataclass(option) for option in options(hints.get(key, type(None))))
        if table and isinstance(value, bool):
            off += [] if value else [key]
            value = {}
        present = merged(present, nest({key: value}))
    return present | dict.fromkeys(off)


class Recorder(pl.Callback):
    """Losses and learning rates of all steps.

    Attributes:
        losses: The loss of each step.
        rates: The rates of the parameter groups in each step.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def add(self, loss: float, rates: Sequence[float]) -> None:
        """Add a step; raise Enough after the last one."""
        self.losses.append(loss)
        self.rates.append(list(rates))
        if len(self.losses) == self.limit:
            raise Enough

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Keep the rates before the scheduler's step."""
        self.now = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        """Add the step."""
        self.add(float(outputs["loss"]), self.now)


class Enough(Exception):
    """As many steps as were asked for."""


class Ordered(Sampler[tuple[int, int]]):
    """The keys of a training sampler in the order of an archive.

    Args:
        usual: The sampler; it says how many images an epoch has.
        order: Positions ``[epochs, images]``.
    """

    def __init__(self, usual: Sampler[tuple[int, int]], order: np.ndarray) -> None:
        self.usual, self.order = usual, order

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number, (epoch, _) in enumerate(self.usual):
            yield epoch, int(self.order[epoch][number])

    def __len__(self) -> int:
        return len(self.usual)  # type: ignore[arg-type]


class ArchiveSession(Session):
    """The session of an archive's run: its start and its order of images; ``recorder`` has the steps."""

    def __init__(self, archive: Archive, output: str, limit: int | None = None) -> None:
        super().__init__(archive.config(output))
        self.archive, self.recorder = archive, Recorder(limit)

    @functools.cached_property
    def method(self) -> PromptMethod:
        """The method with the archive's start tensors.

        Raises:
            ConfigError: The archive lacks a trained tensor, or its order is not one of the images.
        """
        method = super().method
        order, images = self.archive.order, len(self.drawn.train)
        rows = np.sort(order, axis=-1)
        if order.ndim != 2 or not ((rows >= 0) & (rows < images)).all() or (np.diff(rows, axis=-1) == 0).any():
            raise ConfigError(f"order {list(order.shape)} has other positions than those of {images} images, each once")
        if missing := [name for name, _ in method.trainable_parameters() if name not in self.archive.start]:
            raise ConfigError(f"it has no start/ of {', '.join(missing)}, which {method.name} trains")
        if not isinstance(method, FittedMethod):  # fitted methods have one start
            method.load_trained_state({**method.trained_state(), **self.archive.start})
        elif (steps := getattr(method.cache, "training_steps", None)) is not None:
            if list(inspect.signature(steps).parameters)[1:] != ["labels", "order"]:
                raise ConfigError(f"{method.name} is not fitted in one order of the images")
            method.cache.training_steps = functools.partial(self._fitting_steps, steps)
        return method

    def data(self, method: PromptMethod, task: FewShotTask) -> FewShotData:
        """Return the data module; training images of the run are in the archive's order."""
        data = super().data(method, task)
        if task is self.task:
            data.train_dataloader = functools.partial(self._ordered, data)  # type: ignore[method-assign]
        return data

    def _ordered(self, data: FewShotData) -> DataLoader[Any]:
        loader = type(data).train_dataloader(data)
        batches: Any = loader.batch_sampler
        images = self.archive.order.shape[1]
        if len(batches.sampler) != images:
            raise ConfigError(f"order has {images} images an epoch; vlprompt trains on {len(batches.sampler)}")
        batches.sampler = Ordered(batches.sampler, self.archive.order)
        if data.trainer is not None:
            data.trainer.callbacks.append(self.recorder)  # type: ignore[attr-defined]
        return loader

    def _fitting_steps(self, usual: Any, features: Tensor, labels: Tensor, order: Sequence[Tensor]) -> Iterator[Any]:
        """Yield the steps of a fitted method in the archive's order."""
        for step in usual(features, labels, [torch.from_numpy(row).long() for row in self.archive.order]):
            self.recorder.add(step.loss, [step.lr])
            yield step


def check_archive(path: Path, limit: int | None = None) -> tuple[int, float, list[str]]:
    """Print the errors of one archive; return the number of compared arrays, the largest error, and what is wrong."""
    archive = Archive(path)
    with tempfile.TemporaryDirectory() as output:
        session = ArchiveSession(archive, output, limit)
        config = session.config
        print(f"{path}  ({config.method} on {config.data.name}, {len(archive.losses)} steps)")
        if archive.unread:
            print(f"  not read: {', '.join(archive.unread)}")
        try:
            with quiet():
                results = run_session(session).results["results"]
        except Enough:
            results = None
    steps, losses, rates = session.recorder, archive.losses, archive.rates
    if limit is not None:
        losses, rates = losses[:limit], rates[:limit]
    own_rates = np.array(steps.rates)
    errors = {
        "losses": step_error(np.array(steps.losses), losses, FLOOR),
        "rates": step_error(own_rates if rates.ndim == 2 or not own_rates.size else own_rates[:, 0], rates),
    }
    wrong = [f"{name} was not compared" for name in archive.unread if name not in archive.meta]
    if len(steps.losses) != len(losses):
        wrong.append(f"{len(steps.losses)} steps in place of {len(losses)}")
    if results is not None:
        state = session.method.trained_state()
        errors |= {
            f"end/{name}": relative_error(state[name], value.numpy()) if name in state else float("inf")
            for name, value in archive.end.items()
        }
        wrong += [
            f"end/{name} is not in the archive"
            for name, _ in session.method.trainable_parameters()
            if name not in archive.end
        ]
    for name, error in errors.items():
        print(f"  {name:<70} {error:.1e}")
    for key, classes in CORRECT.items():
        if results is not None and key in archive.meta:
            score, expected = results.get(classes) or {}, list(archive.meta[key])
            found = [score.get("correct"), score.get("total")]
            print(f"  {key:<70} {found[0]} of {found[1]}, in the archive {expected[0]} of {expected[1]}")
            if found != expected:
                wrong.append(f"{key} {found} in place of {expected}")
    return len(errors), max(errors.values()), [f"{path.name}: {text}" for text in wrong]


def step_error(values: np.ndarray, reference: np.ndarray, floor: float = 0.0) -> float:
    """Return the largest error of a step relative to its size; infinity if shapes differ or a value is not finite.

    A size below the share ``floor`` of the largest one counts as that share of it.
    """
    if values.shape != reference.shape or not np.isfinite([values, reference]).all() or not values.size:
        return float("inf")
    size = np.maximum(np.abs(reference), floor * np.abs(reference).max())
    return float((np.abs(values - reference) / np.where(size > 0, size, 1.0)).max())


def main(argv: list[str] | None = None) -> int:
    """Check all given archives."""
    parser = argparse.ArgumentParser(description="Compare trainings with golden runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tol", type=float, default=1e-4, help="largest accepted relative error (default 1e-4)")
    parser.add_argument("--steps", type=int, help="train and compare only the first N steps")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; accepted: 1 or more")
    count, worst, wrong = 0, 0.0, []
    for path in options.files:
        if not path.is_file():
            parser.error(f"there is no file {path}")
        try:
            compared, error, problems = check_archive(path, options.steps)
        except VlpromptError as error_text:
            raise SystemExit(f"{path}: {error_text}") from error_text
        count, worst, wrong = count + compared, max(worst, error), wrong + problems
    print("".join(f"{text}\n" for text in wrong) + f"{count} arrays, max rel err {worst:.2e}")
    return int(bool(wrong) or not worst <= options.tol)


if __name__ == "__main__":
    sys.exit(main())
