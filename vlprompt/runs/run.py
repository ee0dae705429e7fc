"""Training runs: from a configuration to a saved head, results and a table."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vlprompt._dist import is_main_process
from vlprompt._files import write_json
from vlprompt._finite import check_finite
from vlprompt.backbone import Backbone
from vlprompt.config.run import DataConfig, RunConfig, TrainerConfig
from vlprompt.data.tally import tally
from vlprompt.datasets import FewShotTask
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.fit import METRICS, fit, make_trainer, test
from vlprompt.engine.memory import peak_memory
from vlprompt.engine.meta_module import GradientRegulation
from vlprompt.engine.metrics import (
    MulticlassScores,
    counts_of,
    headline,
    metric_of,
    plain_score,
    pooled,
    values_of,
)
from vlprompt.engine.module import PromptModule, Selected, check_trainable
from vlprompt.errors import ConfigError, HeadError, VlpromptError
from vlprompt.io.head import Head, backbone_facts, load_head
from vlprompt.methods import PromptMethod
from vlprompt.methods.fitted import FittedMethod
from vlprompt.runs.class_tables import NamedCounts, class_tables, write_class_tables
from vlprompt.runs.folder import (
    HEAD,
    RESULTS,
    VALIDATION,
    data_record,
    keep_split,
    opened,
    read_json,
    record_inputs,
    shift_record,
    versions,
)
from vlprompt.runs.provenance import backbone_of, check_bank, check_images, check_starts, keep_images, with_kept_split
from vlprompt.runs.results import is_score, misfits
from vlprompt.runs.seeds import CROPS, ORDER, drawn_by_seed, unused_draw
from vlprompt.runs.selection import is_oracle, own_selection, selection_of
from vlprompt.runs.session import Session, complete, device_of, use_of_test_images
from vlprompt.runs.source import check_initialised, source_statistics
from vlprompt.runs.tables import harmonic_mean, results_table

SCHEMA = 1


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: The run folder: config.yaml, env.json, metrics.jsonl, last.ckpt, head/, results.json, per_class.csv,
            confusion.csv (:mod:`vlprompt.runs.class_tables`).
        results: The content of ``results.json``.
        reused: Whether the run was already finished.
    """

    folder: Path
    results: dict[str, Any]
    reused: bool = False

    @property
    def head_dir(self) -> Path:
        """The folder of the saved head."""
        return self.folder / HEAD

    @property
    def class_tables(self) -> list[Path]:
        """The CSV files with scores and counts by class; runs of older versions have none."""
        return class_tables(self.folder)

    def head(self, backbone: Backbone | None = None) -> Head:
        """Return the trained head."""
        return load_head(self.head_dir, backbone)

    def table(self, metrics: Sequence[str] = ()) -> str:
        """Return a printable table of the accuracies and those of zero-shot, or one for each of ``metrics``."""
        return results_table([self.results], metrics)

    @property
    def selected(self) -> dict[str, Any] | None:
        """The epoch, from 0, that the validation images chose, and its scores; None if the last one is kept."""
        selected: dict[str, Any] | None = self.results["train"].get("selected")
        return selected

    def validation(self) -> dict[int, float]:
        """Return the headline score on the validation images by epoch, from 0; empty if they were not scored.

        Raises:
            ConfigError: ``metrics.jsonl`` is damaged.
        """
        name = f"val/{self.results['data'].get('metric', 'accuracy')}"
        lines = read_metrics(self.folder / METRICS)
        return {line["epoch"]: line[name] for line in lines if isinstance(line.get(name), int | float)}


def run(config: RunConfig, *, force: bool = False, after: Session | None = None) -> Run:
    """Train and evaluate as configured; resume an unfinished run, reuse a finished run.

    Args:
        config: The resolved configuration.
        force: Start again even if the run exists.
        after: An earlier session; its data set and backbone are reused if they are the same.

    Raises:
        VlpromptError: Data, weights, settings or values cannot be used; everything missing is reported at once.
    """
    session = Session(config, after=after)
    if text := unused_draw(session.method, session.config):
        warnings.warn(text, stacklevel=2)
    return run_session(session, force=force)


def train(
    method: PromptMethod,
    data: FewShotTask,
    *,
    output: str = "runs",
    transform: str = "random",
    seed: int = 1,
    trainer: TrainerConfig | None = None,
    force: bool = False,
    **recipe: Any,
) -> Run:
    """Train ``method`` on a task, evaluate it and save all files in a run folder, as ``vlprompt train`` does.

    Args:
        method: A method from :func:`vlprompt.create_method` for ``data.class_names``; it is trained in place.
        data: A task from :func:`vlprompt.load_dataset`.
        output: Parent of the run folder.
        transform: ``random`` for crops and flips, or ``center``, with which text-only methods use cached features.
            ``pad`` and ``squash`` are the transform of test images as well; the method gets a backbone with it.
        seed: Seed of the image order and of random transforms.
        trainer: Devices, precision and other trainer options.
        force: Start again even if the run exists.
        **recipe: Fields of the recipe: ``epochs``, ``batch_size``, ``lr``, ...

    Raises:
        VlpromptError: Classes differ between method and data, or values are not accepted.
    """
    if method.class_names != data.class_names:
        raise ConfigError(
            f"the method was made for {len(method.class_names)} classes ({method.class_names[0]!r}, ...), the data has "
            f"{len(data.class_names)} ({data.class_names[0]!r}, ...); create it with data.class_names"
        )
    session = Session.given(
        method,
        data,
        recipe=recipe,
        transform=transform,
        trainer=trainer or TrainerConfig(progress=False),
        seed=seed,
        output=output,
    )
    return run_session(session, force=force)


def run_session(session: Session, *, force: bool = False) -> Run:
    """Train and evaluate the method of ``session`` and save the results in its folder; see :func:`run`."""
    config, method, task, folder = session.config, session.method, session.task, session.folder
    check_initialised(method)
    session.check_order()
    session.check_selection()
    if session.trains:
        check_trainable(method, metric_of(task))
    chosen = own_selection(method) or selection_of(config.output)
    starts = check_starts(session.heads, session.drawn)
    inputs, inputs_sha256 = session.inputs(), session.inputs_sha256()
    with opened(folder, session.plain, inputs, force=force), tally() as images:
        _keep(session)
        known = None if force else _finished(session, inputs_sha256)
        if known is not None:
            _load_trained(method, folder, inputs_sha256)
            return Run(folder, known, reused=True)
        started = time.monotonic()
        with peak_memory(method.backbone.device) as peak:
            source = source_statistics(session)
            trainer, selected = _trained(session, inputs_sha256)
        lines = len(read_metrics(folder / METRICS))
        if lines < trainer.current_epoch:
            warnings.warn(f"{folder / METRICS} lacks {trainer.current_epoch - lines} of the epochs", stacklevel=2)
        trained: dict[str, Any] = {
            "epochs": max(lines, trainer.current_epoch),
            "steps": trainer.global_step,
            "seconds": round(time.monotonic() - started, 1),
        }
        if selected is not None:
            trained["selected"] = {"on": "val", "epoch": selected.epoch, "scores": selected.scores}
        scores, counts = _evaluate(session, trainer, method)
        zeroshot, zeroshot_counts = _evaluate(session, trainer, session.zero_shot)
        results = {
            "schema": SCHEMA,
            "method": config.method,
            "config": session.plain,
            "config_sha256": session.sha256,
            "inputs_sha256": inputs_sha256,
            "backbone": backbone_facts(method.backbone),
            "data": data_record(task, method.backbone, config.data.transform)
            | session.data_facts()
            | session.order_record(),
            "versions": versions(),
            "seed_draws": drawn_by_seed(method, config),
            "results": scores,
            "zeroshot": zeroshot,
            "zeroshot_classifier": session.classifier_facts(session.zero_shot, task, method),
            "images": images.facts(),
            "feature_shift": shift_record(method, task),
            "train": {**trained, "peak_mb": peak.megabytes},
            **source,
        }
        facts: dict[str, Any] = {"run": folder.name, "inputs_sha256": inputs_sha256}
        facts |= {"data": task.describe() | session.data_facts(), **({"starts": starts} if starts else {})}
        if used := use_of_test_images(method):
            results["test_images"] = facts["test_images"] = used
        if chosen:
            results["selection"] = chosen
            facts["selection"] = {"on": chosen["on"], "oracle": chosen["oracle"]}  # a head may be used without its run
        if is_main_process():
            record_inputs(folder, session.plain, inputs)  # again, in case the folder was removed in the meantime
            keep_split(folder, session.drawn)
            Head(method, facts).save_pretrained(folder / HEAD)
            write_class_tables(folder, {"results": counts, "zeroshot": zeroshot_counts})
            write_json(folder / RESULTS, results)  # last, because it marks the run as finished
        return Run(folder, results)


def _keep(session: Session) -> None:
    """Write the split of a folder of the user, and the contents of images of the user, into the run folder."""
    keep_split(session.folder, session.drawn)
    learns = session.trains or isinstance(session.method, FittedMethod)
    starts = [folder for _, folder in session.heads]
    keep_images(session.folder, session.task, starts, session.contents, learns=learns)


def _trained(session: Session, inputs_sha256: str) -> tuple[pl.Trainer, Selected | None]:
    """Train the session's method in place, resuming if possible.

    Args:
        session: The session.
        inputs_sha256: Its :meth:`~vlprompt.runs.session.Session.inputs_sha256` before the training.

    Returns:
        The Trainer, for testing, and the epoch whose parameters the method has, if one was selected.
    """
    session.check_training_images()
    config, method = session.config, session.method
    regulator = session.regulator
    regulation = [] if regulator is None else [GradientRegulation(regulator, session.task_feature())]
    epochs, _ = config.recipe.length(len(session.task.train), config.trainer.accumulate)
    if config.recipe.steps is not None and config.data.on_bad_image == "skip":
        epochs = -1  # fewer images take more epochs for the same steps, at whose end the module stops
    trainer = make_trainer(config.trainer, session.folder, epochs, gradient=method.needs.gradient, callbacks=regulation)
    selected = None
    if isinstance(method, FittedMethod):
        method.fit(session.shots())
        check_finite(method.trained_state(), f"fitting {method.name}", "Change its settings: --settings.*")
    elif session.trains:
        module = PromptModule(method, config.recipe, metric_of(session.task))
        fit(trainer, module, session.data(method, session.task), session.folder, inputs_sha256)
        selected = module.selected
    method.eval()
    return trainer, selected


def validate(config: RunConfig, *, force: bool = False, after: Session | None = None) -> dict[str, Any]:
    """Train as configured and return the score on the validation images; test images are not opened.

    All files are saved in the run folder, so :func:`run` of the same configuration only has to test.

    Args:
        config: The resolved configuration.
        force: Start again even if the run has been scored.
        after: An earlier session; its data set and backbone are reused if they are the same.

    Raises:
        VlpromptError: As :func:`run`, or the data set has no validation images.
    """
    session = Session(config, scored="val", after=after)
    method, task, folder = session.method, session.task, session.folder
    session.check_order()
    session.check_selection()
    if session.trains:
        check_trainable(method, metric_of(task))
    check_starts(session.heads, session.drawn)
    inputs_sha256 = session.inputs_sha256()
    record = {"schema": SCHEMA, "inputs_sha256": inputs_sha256, "val_sha256": task.describe()["val_sha256"]}
    with opened(folder, session.plain, session.inputs(), force=force), tally():
        _keep(session)
        known = None if force else read_json(folder / VALIDATION)
        if known is not None and known.items() >= record.items() and is_score(known.get("val")):
            return dict(known["val"])
        source_statistics(session)
        trainer, _ = _trained(session, inputs_sha256)
        scores, _ = tested(session, trainer, method, task)
        if is_main_process():
            write_json(folder / VALIDATION, {**record, "val": scores})
        return scores


def _finished(session: Session, inputs_sha256: str) -> dict[str, Any] | None:
    """Return the results of a finished run, or None for an unfinished run.

    Raises:
        ConfigError: The results are damaged, or those of another run.
    """
    path = session.folder / RESULTS
    results = read_json(path)
    if results is None:
        return None
    problems = ["another version"] if results.get("schema") != SCHEMA else misfits(results)
    own = {"inputs_sha256": inputs_sha256} if "inputs_sha256" in results else {"config_sha256": session.sha256}
    if not problems and not results.items() >= own.items():
        problems = ["it holds the results of another run"]
    if problems:
        raise ConfigError(
            f"{path} cannot be used: {'; '.join(problems[:4])}.\nTo score the run again, move it aside: "
            f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}"
        )
    return results


def _load_trained(method: PromptMethod, folder: Path, inputs_sha256: str) -> None:
    try:
        trained = load_head(folder / HEAD, method.backbone)
        facts = trained.training_facts
        own = {"inputs_sha256": inputs_sha256} if "inputs_sha256" in facts else {"run": folder.name}
        if not facts.items() >= own.items():
            raise HeadError(f"{folder / HEAD} is the head of another run, {str(facts.get('run'))[:200]!r}")
    except HeadError as error:
        path = folder / RESULTS
        raise HeadError(
            f"the run is finished but its head cannot be used: {error}\nTo make the head again, move the results "
            f"aside: mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}"
        ) from error
    method.load_trained_state(trained.method.trained_state())


def tested(
    session: Session, trainer: pl.Trainer, method: PromptMethod, task: FewShotTask
) -> tuple[dict[str, Any], NamedCounts]:
    """Return the score on the task's test images, and its class names with the counts by class."""
    scores, module = _tested(session, trainer, method, task)
    return scores, (task.class_names, module.per_class)


def _tested(
    session: Session, trainer: pl.Trainer, method: PromptMethod, task: FewShotTask
) -> tuple[dict[str, Any], PromptModule]:
    module = PromptModule(method, metric=metric_of(task))
    return test(trainer, module, session.data(method, task)), module


def _evaluate(
    session: Session, trainer: pl.Trainer, method: PromptMethod
) -> tuple[dict[str, Any], dict[str, NamedCounts]]:
    """Return the scores on the task's test images, pooled and by domain if there are domains, and the class counts.

    For a base task the new classes are scored too, pooled.
    """
    task = session.task
    scores: dict[str, Any] = {}
    counts: dict[str, NamedCounts] = {}
    domains = {name: _tested(session, trainer, method, domain) for name, domain in session.domains.items()}
    sums = [module.scores.sums for _, module in domains.values() if isinstance(module.scores, MulticlassScores)]
    if sums:
        # Every image is in exactly one domain, so the pooled sums are those of all images, and none is tested twice.
        whole = pooled(sums)
        scores[task.classes] = plain_score(metric_of(task), {name: float(x) for name, x in values_of(whole).items()})
        counts[task.classes] = (task.class_names, counts_of(whole))
    else:
        scores[task.classes], counts[task.classes] = tested(session, trainer, method, task)
    if domains:
        scores["domains"] = {name: of_domain for name, (of_domain, _) in domains.items()}
    if task.classes == "base":
        other = session.counterpart
        try:
            moved = method.with_classes(other.class_names)
        except VlpromptError as error:  # class-specific context does not apply to new classes
            return scores | {"new": None, "why_no_new": str(error)}, counts
        scores["new"], counts["new"] = tested(session, trainer, moved, other)
        scores["harmonic_mean"] = harmonic_mean(headline(scores["base"]), headline(scores["new"]))
    return scores, counts


def evaluate_head(
    folder: str | Path,
    data: DataConfig,
    seed: int = 1,
    trainer: TrainerConfig | None = None,
    backbone: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the score of a saved head on the test images of ``data``, with the classes it names.

    A folder of images of the user has the split that the head's run kept. ``oracle`` says whether the head's
    hyperparameters were chosen on test images, ``seed_draws`` what the seed draws.

    Args:
        folder: A run folder or head folder.
        data: The images.
        seed: Seed of the order of test images, for methods that depend on it.
        trainer: Devices and precision.
        backbone: Fields of the backbone's configuration that differ from those that the head records, such as the
            place of its weights (:func:`vlprompt.runs.provenance.backbone_of`).

    Raises:
        VlpromptError: The head or the data cannot be used, or test images are training images of the head.
    """
    trainer = trainer or TrainerConfig(progress=False)
    device = device_of(trainer)
    head = load_head(folder, backbone_of(folder, backbone or {}, device), device=device)
    session = Session.of_head(head, with_kept_split(folder, data, head), seed=seed, trainer=trainer)
    session.check_order()
    check_images(folder, head, session.drawn, trains=session.trains)
    check_bank(head, session.bank_id)
    method, task = session.method, session.task
    quiet = make_trainer(trainer, Path(folder), 1, gradient=method.needs.gradient)
    with tally():  # reports skipped images
        scores, _ = tested(session, quiet, method, task)
    return scores | {
        "data": task.describe() | session.order_record(),
        "oracle": is_oracle([head.training_facts]),
        "seed_draws": [what for what in drawn_by_seed(method, session.config) if what in (CROPS, ORDER)],
    }


__all__: Sequence[str] = [
    "Run",
    "complete",
    "evaluate_head",
    "harmonic_mean",
    "run",
    "run_session",
    "tested",
    "train",
    "validate",
]
