"""Run folders: location, recorded inputs, completion, and the record of the data."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlprompt._dist import first_process_says, is_main_process
from vlprompt._files import lock, open_lock, parse_json, read_text, sha256_json, write_json, write_text
from vlprompt.backbone import Backbone
from vlprompt.config.keys import as_plain
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.config.texts import identified
from vlprompt.config.types import field_default
from vlprompt.config.yaml import yaml_text
from vlprompt.data import describe_transform, test_transform
from vlprompt.datasets import FewShotTask, find_card
from vlprompt.datasets.kept_split import KEPT_SPLIT, split_text
from vlprompt.engine.callbacks import LAST_CHECKPOINT
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import PromptMethod
from vlprompt.objectives.shift import feature_shift
from vlprompt.version import __version__

CONFIG, ENVIRONMENT, RESULTS, HEAD = "config.yaml", "env.json", "results.json", "head"
VALIDATION, TARGETS = "validation.json", "targets"
SHIFT_IMAGES = 64
#: Largest JSON file of a run that is read.
MOST_BYTES = 2**28
PROTOCOLS = {"all": "all classes", "base": "base to new", "new": "new classes"}
_PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "timm"),
    *("pytorch-lightning", "torchmetrics", "numpy", "pillow"),
)
#: Inputs that older runs do not record.
_LATER_INPUTS = ("class names", "preprocessing", "content of the images", "bank")
# Sections and keys that cannot change a result: locations, numbers of processes, progress output.
_INDIFFERENT: dict[str, tuple[str, ...] | None] = {
    "output": None,
    "data": ("root", "workers", "bank"),
    "trainer": ("devices", "accelerator", "progress", "loggers"),
}


def config_sha256(config: RunConfig) -> str:
    """Return the SHA-256 of all values in ``config`` that can change a result; files of texts count by their content.

    A data root counts only if it is itself the data set (:meth:`vlprompt.datasets.Card.own_place`).

    Raises:
        ConfigError: A file of texts cannot be read.
    """
    plain = as_plain(config)
    for section, names in _INDIFFERENT.items():
        for name in names or ():
            del plain[section][name]
        if names is None:
            del plain[section]
    with contextlib.suppress(ConfigError):  # a task made in Python may have no card in the catalogue
        if place := find_card(config.data.name).own_place(config.data.root):
            plain["data"]["place"] = place
    for section in ("settings", "objectives"):
        plain[section] = identified(plain[section])
    for name in ("init_from", "decomposition"):  # keys that older runs do not have
        if not plain[name]:
            del plain[name]
    for name in ("orientation", "background"):
        if plain["data"][name] is None:
            del plain["data"][name]
    if plain["backbone"]["image_size"] is None:
        del plain["backbone"]["image_size"]
    for name in ("steps", "drop_last", "warmup", "warmup_steps", "select", "validate_every"):  # nor these
        if plain["recipe"][name] == field_default(RecipeConfig, name):
            del plain["recipe"][name]
    return sha256_json(plain)


def run_folder(config: RunConfig) -> Path:
    """Return ``output/method/dataset/<classes>-<shots>shot-seed<seed>-<hash>``; equal settings give equal folders."""
    data = config.data
    shots = "all" if data.shots == -1 else f"{data.shots}shot"
    name = f"{data.classes}-{shots}-seed{config.seed}-{config_sha256(config)[:8]}"
    return Path(config.output) / config.method / data.name / name


@contextlib.contextmanager
def opened(folder: Path, config: Mapping[str, Any], inputs: dict[str, str], *, force: bool) -> Iterator[None]:
    """Lock ``folder`` for this run; write its configuration and environment, or check that they match this run.

    Args:
        folder: The run's folder.
        config: The resolved configuration, in plain values.
        inputs: Checksums of the inputs (split, weights, initial prompts).
        force: Move the folder of an earlier run aside, to ``<folder>.old-1`` or the next free number.

    Raises:
        ConfigError: Another process uses the folder, it was made from other inputs, or it cannot be created.
    """
    if not is_main_process():
        _agree()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = open_lock(folder.parent / f".{folder.name}.lock")
    except OSError as error:
        _agree(refused=True)
        raise ConfigError(
            f"the run folder {folder} cannot be made: {error.strerror or error}. Choose another place: --output FOLDER"
        ) from error
    ready = False
    try:
        _hold(lock_file, folder)
        if force:
            _set_aside(folder)
        _check_inputs(folder, inputs)
        _sweep(folder)
        record_inputs(folder, config, inputs)
        ready = True
        _agree()
        yield
    finally:
        if not ready:
            _agree(refused=True)
        os.close(lock_file)


def record_inputs(folder: Path, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Write the configuration of a run into its folder, and its environment if that is not there."""
    write_text(folder / CONFIG, yaml_text(config))
    if not os.path.lexists(folder / ENVIRONMENT):
        write_json(folder / ENVIRONMENT, environment(config["seed"]) | {"inputs": dict(inputs)})


def _hold(file: int, folder: Path) -> None:
    try:
        lock(file)
    except OSError:
        raise ConfigError(f"another process is running in {folder}; wait for it, or stop it first") from None


def _agree(refused: bool = False) -> None:
    """Wait until the first process of this run has prepared the folder; exit the others if it is refused.

    In the first run of a command only one process exists until the Trainer starts the others; later runs have all.
    """
    if first_process_says(refused) and not is_main_process():
        sys.exit(2)  # the first process reports why


def _sweep(folder: Path) -> None:
    """Remove temporary files of killed writers; the folder is locked, so there are no active writers."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f".{HEAD}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _start_again(folder: Path) -> str:
    return (
        "To keep it in its place, choose another --output. "
        f"To start again here, add --force: it moves what is there to {aside(folder).name}."
    )


def _check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    known = read_json(folder / ENVIRONMENT)
    if known is None:
        if outputs := [name for name in (RESULTS, LAST_CHECKPOINT) if (folder / name).exists()]:
            raise ConfigError(
                f"{folder} holds {' and '.join(outputs)} but no {ENVIRONMENT}, which says what they were made from. "
                f"{_start_again(folder)}"
            )
        return
    recorded = known.get("inputs")
    if not isinstance(recorded, dict):
        raise ConfigError(f"{folder / ENVIRONMENT} is damaged: it lacks 'inputs'; start the run again with --force")
    missing = {name: inputs[name] for name in _LATER_INPUTS if name in inputs and name not in recorded}
    changed = [name for name, value in inputs.items() if (missing | recorded).get(name) != value]
    if changed:
        raise ConfigError(
            f"{folder} was started from another {', '.join(changed)}; its results would not be this run's. "
            f"{_start_again(folder)}"
        )


def aside(folder: Path) -> Path:
    """Return the place that ``--force`` moves the run in ``folder`` to: ``<folder>.old-1`` or the next free number."""
    taken = {path.name for path in folder.parent.glob(f"{glob.escape(folder.name)}.old-*")}
    numbered = (f"{folder.name}.old-{number}" for number in itertools.count(1))
    return folder.with_name(next(name for name in numbered if name not in taken))


def _set_aside(folder: Path) -> None:
    """Move ``folder`` and all that is in it aside and create it again."""
    if not any(folder.iterdir()):
        return
    place = aside(folder)
    try:
        os.rename(folder, place)
        folder.mkdir()
    except OSError as error:
        raise ConfigError(
            f"the earlier run in {folder} cannot be moved aside to {place}: {error.strerror or error}. "
            "Choose another place: --output FOLDER"
        ) from error
    warnings.warn(f"the earlier run was moved to {place}", stacklevel=2)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None if there is nothing.

    Raises:
        ConfigError: It is not a file that holds a JSON object.
    """
    if not os.path.lexists(path):
        return None
    try:
        value = parse_json(read_text(path, MOST_BYTES))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); start the run again with --force") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; start the run again with --force")
    return value


def environment(seed: int) -> dict[str, Any]:
    """Return what a result may depend on besides the configuration: versions, git state, seed, machine, command."""
    return {
        "command": sys.argv,
        "git": _git(),
        "versions": versions(),
        "seeds": {"run": seed, "shots": seed},
        "machine": {
            "platform": platform.platform(),
            "gpus": torch.cuda.device_count(),
            "threads": torch.get_num_threads(),
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of vlprompt, of the packages that its results depend on, and of Python."""
    package_versions = {"vlprompt": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package_versions[name] = importlib.metadata.version(name)
    return package_versions | {"python": platform.python_version()}


def _git() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def keep_split(folder: Path, task: FewShotTask) -> None:
    """Write the split of a folder of images of the user into the run folder, if it is not there yet.

    ``eval`` takes it from there, and ``data.split`` for other runs: images that come later join it.
    """
    lists, path = task.lists, folder / KEPT_SPLIT
    if is_main_process() and lists is not None and task.card.keeps_split and not os.path.lexists(path):
        write_text(path, split_text(lists))


# -- the record of data in a results file ------------------------------------------------------------------------
def data_record(task: FewShotTask, backbone: Backbone, transform: str) -> dict[str, Any]:
    """Return the record of a run's data: the task's description, and the transforms as text.

    Args:
        task: The task.
        backbone: The backbone, for the preprocessing of the transforms.
        transform: The training transform, ``random`` or ``center``.
    """
    kinds = {"train": transform, "test": "center"}
    transforms = {split: describe_transform(backbone.preprocess, kind) for split, kind in kinds.items()}
    return {**task.describe(), "protocol": PROTOCOLS[task.classes], "transform": transforms}


def shift_record(method: PromptMethod, task: FewShotTask) -> dict[str, Any] | None:
    """Return how far training moved text and image features; None for methods without trainable parameters.

    The image side is measured on the readable ones of the first 64 test images
    (:func:`vlprompt.objectives.shift.feature_shift`).
    """
    if not method.trainable_parameters():
        return None
    transform, loaded = test_transform(method.backbone.preprocess), []
    for sample in task.test[:SHIFT_IMAGES] if method.sees_images else ():
        try:
            loaded.append(transform(sample.source.open()))
        except DataError:  # reported when images are scored
            continue
    images = torch.stack(loaded).to(method.backbone.device) if loaded else None
    return {**feature_shift(method, images, task.template), "images": len(loaded)}
