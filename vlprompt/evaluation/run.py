"""One run: from a configuration to a trained, saved head, its results and a table."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vlprompt.backbone import Backbone, load_backbone
from vlprompt.data import FewShotData, FewShotTask, load_dataset
from vlprompt.engine.callbacks import LAST_CHECKPOINT, read_metrics, write_text
from vlprompt.engine.config import BackboneConfig, DataConfig, RecipeConfig, RunConfig, TrainerConfig
from vlprompt.engine.fit import METRICS, check_devices, fit, make_trainer, score, test
from vlprompt.engine.module import PromptModule
from vlprompt.errors import ConfigError, HeadError, VlpromptError
from vlprompt.evaluation.folder import (
    HEAD,
    RESULTS,
    config_sha256,
    is_main_process,
    opened,
    read_json,
    run_folder,
    tensors_sha256,
)
from vlprompt.evaluation.tables import results_table
from vlprompt.io.head import Head, backbone_facts, load_head
from vlprompt.methods import PromptMethod, create_method, get_method_class

SCHEMA = 1
_RESULT_PARTS = {"method", "config", "backbone", "data", "results", "zeroshot", "train"}


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: Where everything is: config.yaml, env.json, metrics.jsonl, last.ckpt, head/, results.json.
        results: The content of ``results.json``.
        reused: Whether it was finished before and nothing had to be done.
    """

    folder: Path
    results: dict[str, Any]
    reused: bool = False

    @property
    def head_dir(self) -> Path:
        """The folder of the saved head."""
        return self.folder / HEAD

    def head(self, backbone: Backbone | None = None) -> Head:
        """Return the trained head."""
        return load_head(self.head_dir, backbone)

    def table(self) -> str:
        """Return the accuracies beside zero-shot's, ready to print."""
        return results_table([self.results])


def run(config: RunConfig, *, force: bool = False) -> Run:
    """Train and evaluate what ``config`` says; go on with an unfinished run, reuse a finished one.

    Args:
        config: The resolved configuration.
        force: Start anew even if the run is there.

    Raises:
        VlpromptError: Data, weights, settings or values that cannot be used; everything that is missing is reported at
            once.
    """
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    check_devices(config.trainer)
    config = complete(config)
    task, backbone = _load_both(config)
    pl.seed_everything(config.seed, verbose=False)
    method = build_method(config, backbone, task)
    return _run(config, method, task, force=force)


def train(
    method: PromptMethod,
    data: FewShotTask,
    *,
    output: str = "runs",
    view: str = "random",
    seed: int = 1,
    trainer: TrainerConfig | None = None,
    force: bool = False,
    **recipe: Any,
) -> Run:
    """Train ``method`` on a task, evaluate it and keep everything in a run folder, as ``vlprompt train`` does.

    Args:
        method: A method made with :func:`vlprompt.create_method` for ``data.class_names``; it is trained in place.
        data: What :func:`vlprompt.load_dataset` gives.
        output: Folder under which the run's folder is made.
        view: ``random`` crops and flips, or ``center``; then text-only methods train from cached features.
        seed: Order of the images and their random views.
        trainer: Devices, precision and the like.
        force: Start anew even if the run is there.
        **recipe: Fields of the recipe: ``epochs``, ``batch_size``, ``lr``, ...

    Raises:
        VlpromptError: Classes that differ between method and data, or values that are not accepted.
    """
    if method.class_names != data.class_names:
        raise ConfigError(
            f"the method was made for {len(method.class_names)} classes ({method.class_names[0]!r}, ...), the data has "
            f"{len(data.class_names)} ({data.class_names[0]!r}, ...); create it with data.class_names"
        )
    known = {entry.name for entry in dataclasses.fields(RecipeConfig)}
    if unknown := [name for name in recipe if name not in known]:
        raise ConfigError(f"the recipe has no field {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
    config = RunConfig(
        method=method.name,
        settings=method.settings_dict(),
        backbone=BackboneConfig(method.backbone.name, method.backbone.pretrained, method.backbone.precision),  # type: ignore[arg-type]
        data=DataConfig(
            data.name,
            data.root,
            data.shots,
            data.classes,
            view,  # type: ignore[arg-type]
            data.template,
            source=list(data.source),
            target=list(data.target),
        ),
        recipe=RecipeConfig(**recipe),
        trainer=trainer or TrainerConfig(progress=False),
        seed=seed,
        output=output,
    )
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    return _run(config, method, data, force=force)


def _load_both(config: RunConfig) -> tuple[FewShotTask, Backbone]:
    """Load data and backbone; when both are missing, one error says so."""
    missing: list[VlpromptError] = []
    task: FewShotTask | None = None
    backbone: Backbone | None = None
    try:
        task = load_task(config.data, config.seed)
    except VlpromptError as error:
        missing.append(error)
    try:
        backbone = load_backbone(
            config.backbone.name,
            config.backbone.pretrained,
            precision=config.backbone.precision,
            device=device_of(config.trainer),
        )
    except VlpromptError as error:
        missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if task is None or backbone is None:
        raise ConfigError("two things are missing.\n\n1. " + str(missing[0]) + "\n\n2. " + str(missing[1]))
    return task, backbone


def device_of(config: TrainerConfig) -> str:
    """Return the device of this process: its own GPU where GPUs are used, else the CPU."""
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def load_task(data: DataConfig, seed: int, classes: str | None = None) -> FewShotTask:
    """Return the task that ``data`` names, or its counterpart with other ``classes``."""
    return load_dataset(
        data.name,
        root=data.root,
        shots=data.shots,
        seed=seed,
        classes=classes or data.classes,
        template=data.template,
        source=data.source,
        target=data.target,
    )


def build_method(config: RunConfig, backbone: Backbone, task: FewShotTask) -> PromptMethod:
    """Return the configured method for the task's classes; templates left open are the data set's own."""
    settings = with_own_template(get_method_class(config.method), config.settings, task.template)
    others = [name for name in task.all_class_names if name not in set(task.class_names)]
    everything = [*task.class_names, *others]
    return create_method(config.method, backbone, task.class_names, all_class_names=everything, **settings).to(
        backbone.device
    )


def complete(config: RunConfig) -> RunConfig:
    """Return ``config`` with the method's defaults for settings that are left out, as the command line has it.

    Equal runs so have equal folders. Only a template that is the data set's own is left open.
    """
    kind = get_method_class(config.method)
    defaults = {}
    for entry in dataclasses.fields(kind.Settings):
        if entry.name == kind.template_setting:
            continue
        if entry.default is not dataclasses.MISSING:
            defaults[entry.name] = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            defaults[entry.name] = entry.default_factory()
    return dataclasses.replace(config, settings={**defaults, **config.settings})


def with_own_template(kind: type[PromptMethod], settings: dict[str, Any], template: str) -> dict[str, Any]:
    """Return ``settings`` with the data set's ``template`` where the method takes one and none is given."""
    name = kind.template_setting
    if name is None or settings.get(name):
        return dict(settings)
    return {**settings, name: [template]}


def _run(config: RunConfig, method: PromptMethod, task: FewShotTask, *, force: bool) -> Run:
    folder = run_folder(config)
    inputs = {
        "split": task.split_sha256,
        "choice of shots": task.shots_sha256,
        "backbone": method.backbone.fingerprint,
        "initial prompts": tensors_sha256(method.learnable_state()),
    }
    with opened(folder, config, inputs, force=force):
        known = None if force else _finished(folder)
        if known is not None:
            _load_trained(method, folder)
            return Run(folder, known, reused=True)
        started = time.monotonic()
        trainer = make_trainer(config.trainer, folder, config.recipe.epochs)
        if method.parameter_groups(config.recipe.lr):
            fit(trainer, PromptModule(method, config.recipe), _data(config, method, task), folder)
        method.eval()
        results = {
            "schema": SCHEMA,
            "method": config.method,
            "config": dataclasses.asdict(config),
            "config_sha256": config_sha256(config),
            "backbone": backbone_facts(method.backbone),
            "data": task.describe(),
            "results": _evaluate(config, trainer, method, task),
            "zeroshot": _evaluate(config, trainer, _zeroshot(method, task), task),
            "train": {"epochs": len(read_metrics(folder / METRICS)), "seconds": round(time.monotonic() - started, 1)},
        }
        if is_main_process():
            Head(method, {"run": folder.name, "data": task.describe()}).save_pretrained(folder / HEAD)
            write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")  # last: it marks the run as finished
        return Run(folder, results)


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a finished run; None for an unfinished one."""
    results = read_json(folder / RESULTS)
    if results is not None and (results.get("schema") != SCHEMA or not _RESULT_PARTS <= results.keys()):
        raise ConfigError(f"{folder / RESULTS} is damaged or of another version; start the run anew with --force")
    return results


def _load_trained(method: PromptMethod, folder: Path) -> None:
    try:
        trained = load_head(folder / HEAD, method.backbone)
    except HeadError as error:
        raise HeadError(f"the run is finished but its head cannot be used; redo it with --force.\n{error}") from error
    method.load_learnable_state(trained.method.learnable_state())


def _zeroshot(method: PromptMethod, task: FewShotTask) -> PromptMethod:
    zeroshot = create_method("zeroshot", method.backbone, task.class_names, templates=[task.template])
    return zeroshot.to(method.backbone.device).eval()


def _data(config: RunConfig, method: PromptMethod, task: FewShotTask) -> FewShotData:
    backbone = method.backbone
    return FewShotData(
        task,
        backbone.preprocess,
        batch_size=config.recipe.batch_size,
        test_batch_size=config.recipe.test_batch_size,
        view=config.data.view,
        seed=config.seed,
        workers=config.data.workers,
        encode=None if method.learns_image_side else backbone.encode_image,
        fingerprint=backbone.fingerprint,
        device=backbone.device,
    )


def _evaluate(config: RunConfig, trainer: pl.Trainer, method: PromptMethod, task: FewShotTask) -> dict[str, Any]:
    """Return correct, total and accuracy on the task's test images, pooled and by domain where there are domains.

    After a base task the new classes are scored too, pooled.
    """
    found: dict[str, Any] = {}
    if parts := task.by_domain():
        # Every image is in one domain: the counts add up, and nothing has to be tested twice.
        by_domain = {
            name: test(trainer, PromptModule(method), _data(config, method, part)) for name, part in parts.items()
        }
        correct, total = (sum(int(one[key]) for one in by_domain.values()) for key in ("correct", "total"))
        found |= {task.classes: score(correct, total), "domains": by_domain}
    else:
        found[task.classes] = test(trainer, PromptModule(method), _data(config, method, task))
    if task.classes == "base":
        other = task.counterpart()
        try:
            moved = method.with_classes(other.class_names)
        except VlpromptError as error:  # class-specific context has nothing to say about new classes
            return found | {"new": None, "why_no_new": str(error)}
        found["new"] = test(trainer, PromptModule(moved), _data(config, moved, other))
        found["harmonic_mean"] = harmonic_mean(found["base"]["accuracy"], found["new"]["accuracy"])
    return found


def harmonic_mean(base: float, new: float) -> float:
    """Return ``2 * base * new / (base + new)``, in the unit of its arguments; 0 when both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def evaluate_head(
    folder: str | Path, data: DataConfig, seed: int = 1, trainer: TrainerConfig | None = None
) -> dict[str, Any]:
    """Return correct, total and accuracy of a saved head on the test images of ``data``, with the classes it names.

    Raises:
        VlpromptError: The head or the data cannot be used.
    """
    if problems := data.problems():
        raise ConfigError("\n".join(problems))
    trainer_config = trainer or TrainerConfig(progress=False)
    head = load_head(folder, device=device_of(trainer_config))
    task = load_task(data, seed)
    method = head.method if task.class_names == head.class_names else head.method.with_classes(task.class_names)
    config = RunConfig(method=method.name, data=data, trainer=trainer_config, seed=seed)
    quiet_trainer = make_trainer(trainer_config, Path(folder), 1)
    return test(quiet_trainer, PromptModule(method.eval()), _data(config, method, task)) | {"data": task.describe()}


def last_checkpoint(folder: Path) -> Path:
    """Return where a run keeps its last checkpoint."""
    return folder / LAST_CHECKPOINT


__all__: Sequence[str] = [
    "Run",
    "build_method",
    "complete",
    "evaluate_head",
    "harmonic_mean",
    "load_task",
    "run",
    "train",
]
