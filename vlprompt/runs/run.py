"""One run: from a configuration to a trained, saved head, its results and a table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vlprompt._dist import is_main_process
from vlprompt._files import write_json
from vlprompt.backbone import Backbone
from vlprompt.config.run import BackboneConfig, DataConfig, RecipeConfig, RunConfig, TrainerConfig
from vlprompt.data.tally import tally
from vlprompt.datasets import FewShotTask
from vlprompt.engine.callbacks import LAST_CHECKPOINT, read_metrics
from vlprompt.engine.fit import METRICS, check_devices, fit, make_trainer, score, test
from vlprompt.engine.memory import peak_memory
from vlprompt.engine.meta_module import GradientRegulation
from vlprompt.engine.metrics import headline, metric_of
from vlprompt.engine.module import PromptModule, check_trainable
from vlprompt.errors import ConfigError, HeadError, VlpromptError
from vlprompt.io.head import Head, backbone_facts, load_head
from vlprompt.methods import PromptMethod
from vlprompt.runs.feeding import (
    check_processes,
    data_of,
    shots_of,
    task_feature,
    training_images,
    training_task,
    use_of_test_images,
)
from vlprompt.runs.folder import (
    HEAD,
    RESULTS,
    VALIDATION,
    config_sha256,
    opened,
    read_json,
    run_folder,
    tensors_sha256,
    versions,
)
from vlprompt.runs.prepare import build_method, complete, device_of, load_both, load_task, regulator_of, zeroshot_method
from vlprompt.runs.record import data_record, shift_record
from vlprompt.runs.selection import is_oracle, own_selection, selection_of
from vlprompt.runs.tables import results_table

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
    config, task, backbone = _ready(config)
    pl.seed_everything(config.seed, verbose=False)
    method = build_method(config, backbone, task)
    return _run(config, method, task, force=force)


def _ready(config: RunConfig) -> tuple[RunConfig, FewShotTask, Backbone]:
    """Return the checked and completed configuration, its task and its backbone."""
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    check_devices(config.trainer)
    config = complete(config)
    return config, *load_both(config)


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
        objectives=method.objective_settings,
        decomposition=method.decomposition_settings,
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
            split=data.request.get("split"),
            sampler=data.request.get("sampler"),
            shots_file=None if data.request.get("shots_file") is None else str(data.request["shots_file"]),
        ),
        recipe=RecipeConfig(**recipe),
        trainer=trainer or TrainerConfig(progress=False),
        seed=seed,
        output=output,
    )
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    return _run(config, method, data, force=force)


def _run(config: RunConfig, method: PromptMethod, task: FewShotTask, *, force: bool) -> Run:
    if method.parameter_groups(config.recipe.lr):
        check_trainable(method, metric_of(task))
    task = training_task(method, task)
    folder = run_folder(config)
    with opened(folder, config, _inputs(config, method, task), force=force), tally() as images:
        known = None if force else _finished(folder)
        if known is not None:
            _load_trained(method, folder)
            return Run(folder, known, reused=True)
        started = time.monotonic()
        with peak_memory(method.backbone.device) as peak:
            trainer = _trained(config, method, task, folder)
        trained = {"epochs": len(read_metrics(folder / METRICS)), "seconds": round(time.monotonic() - started, 1)}
        scores, per_class = _evaluate(config, trainer, method, task)
        zeroshot, zeroshot_per_class = _evaluate(config, trainer, zeroshot_method(method.backbone, task), task)
        results = {
            "schema": SCHEMA,
            "method": config.method,
            "config": dataclasses.asdict(config),
            "config_sha256": config_sha256(config),
            "backbone": backbone_facts(method.backbone),
            "data": data_record(task, method.backbone, config.data.view),
            "versions": versions(),
            "results": scores,
            "zeroshot": zeroshot,
            "per_class": {"results": per_class, "zeroshot": zeroshot_per_class},
            "images": images.facts(),
            "feature_shift": shift_record(method, task),
            "train": {**trained, "peak_mb": peak.megabytes},
        }
        facts = {"run": folder.name, "data": task.describe()}
        if used := use_of_test_images(method):
            results["test_images"] = facts["test_images"] = used
        if chosen := own_selection(method) or selection_of(config.output):
            results["selection"] = chosen
            facts["selection"] = {"on": chosen["on"], "oracle": chosen["oracle"]}  # a head may travel alone
        if is_main_process():
            Head(method, facts).save_pretrained(folder / HEAD)
            write_json(folder / RESULTS, results)  # last: it marks the run as finished
        return Run(folder, results)


def _inputs(config: RunConfig, method: PromptMethod, task: FewShotTask) -> dict[str, str]:
    regulator = regulator_of(config, method)
    return {
        "split": task.split_sha256,
        "choice of shots": task.shots_sha256,
        "backbone": method.backbone.fingerprint,
        "initial prompts": tensors_sha256(method.trained_state()),
        **({} if regulator is None else {"gradient regulator": tensors_sha256(regulator.state_dict())}),
    }


def _trained(config: RunConfig, method: PromptMethod, task: FewShotTask, folder: Path) -> pl.Trainer:
    """Train ``method`` in place, as far as it is not trained yet; return the Trainer to test it with."""
    check_processes(config, method)
    regulator = regulator_of(config, method)
    regulation = [] if regulator is None else [GradientRegulation(regulator, task_feature(config, method, task))]
    trainer = make_trainer(
        config.trainer, folder, config.recipe.epochs, gradient=method.needs_gradient, callbacks=regulation
    )
    if method.fits:
        method.fit(shots_of(config, method, task))
    elif method.wants_source:
        method.measure_source(training_images(config, method, task))
    elif method.parameter_groups(config.recipe.lr):
        fit(trainer, PromptModule(method, config.recipe), data_of(config, method, task), folder)
    method.eval()
    return trainer


def validate(config: RunConfig, *, force: bool = False) -> dict[str, Any]:
    """Train what ``config`` says and return its score on the validation images; test images are not opened.

    Everything is kept in the run's folder, so that :func:`run` of the same configuration only has to test.

    Args:
        config: The resolved configuration.
        force: Start anew even if it has been scored.

    Raises:
        VlpromptError: As :func:`run`; or a data set without validation images.
    """
    config, task, backbone = _ready(config)
    if not task.val:
        raise ConfigError(f"{task.name} has no validation images to score on")
    # In place of the test images, which so cannot be touched by what follows.
    task = dataclasses.replace(task, test=task.val)
    pl.seed_everything(config.seed, verbose=False)
    method = build_method(config, backbone, task)
    if method.parameter_groups(config.recipe.lr):
        check_trainable(method, metric_of(task))
    task = training_task(method, task)
    folder = run_folder(config)
    with opened(folder, config, _inputs(config, method, task), force=force), tally():
        known = None if force else read_json(folder / VALIDATION)
        if known is not None and known.get("val_sha256") == task.describe()["val_sha256"] and "val" in known:
            return dict(known["val"])
        found, _ = tested(config, _trained(config, method, task, folder), method, task)
        if is_main_process():
            kept = {"schema": SCHEMA, "val_sha256": task.describe()["val_sha256"], "val": found}
            write_json(folder / VALIDATION, kept)
        return found


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
    method.load_trained_state(trained.method.trained_state())


def tested(
    config: RunConfig, trainer: pl.Trainer, method: PromptMethod, task: FewShotTask
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return the score of the task's test images, and the correct and total counts per class."""
    module = PromptModule(method, metric=metric_of(task))
    found = test(trainer, module, data_of(config, method, task))
    return found, module.per_class


def _evaluate(
    config: RunConfig, trainer: pl.Trainer, method: PromptMethod, task: FewShotTask
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scores on the task's test images, pooled and by domain where there are domains, and the class counts.

    After a base task the new classes are scored too, pooled.
    """
    found: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    parts = {name: tested(config, trainer, method, part) for name, part in task.by_domain().items()}
    if parts and metric_of(task) == "accuracy":
        # Every image is in one domain: the counts add up, and nothing has to be tested twice.
        correct, total = (sum(one[key] for one, _ in parts.values()) for key in ("correct", "total"))
        found[task.classes] = score(correct, total)
        counts[task.classes] = {
            key: [sum(own) for own in zip(*(per_class[key] for _, per_class in parts.values()), strict=True)]
            for key in ("correct", "total")
        }
    else:
        found[task.classes], counts[task.classes] = tested(config, trainer, method, task)
    if parts:
        found["domains"] = {name: one for name, (one, _) in parts.items()}
    if task.classes == "base":
        other = task.counterpart()
        try:
            moved = method.with_classes(other.class_names)
        except VlpromptError as error:  # class-specific context has nothing to say about new classes
            return found | {"new": None, "why_no_new": str(error)}, counts
        found["new"], counts["new"] = tested(config, trainer, moved, other)
        found["harmonic_mean"] = harmonic_mean(headline(found["base"]), headline(found["new"]))
    return found, counts


def harmonic_mean(base: float, new: float) -> float:
    """Return ``2 * base * new / (base + new)``, in the unit of its arguments; 0 when both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def evaluate_head(
    folder: str | Path, data: DataConfig, seed: int = 1, trainer: TrainerConfig | None = None
) -> dict[str, Any]:
    """Return the score of a saved head on the test images of ``data``, with the classes it names.

    ``oracle`` says whether its hyperparameters were chosen on test images.

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
    quiet_trainer = make_trainer(trainer_config, Path(folder), 1, gradient=method.needs_gradient)
    with tally():  # says which images had to be left out
        found, _ = tested(config, quiet_trainer, method.eval(), task)
    return found | {"data": task.describe(), "oracle": is_oracle([head.training_facts])}


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
    "tested",
    "train",
    "validate",
]
