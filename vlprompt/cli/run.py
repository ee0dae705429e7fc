"""The commands ``train``, ``eval`` and ``predict``."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlprompt._terminal import show, show_json, text_of
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, check_run, key_table, read_command_line, refuse, source_of
from vlprompt.cli.protocols import metrics_on, need_config, protocol_command, say
from vlprompt.config.keys import to_yaml
from vlprompt.config.run import WHOLE_TRANSFORMS, BackboneConfig, TrainerConfig
from vlprompt.config.source import origin_of
from vlprompt.config.yaml import shown
from vlprompt.errors import ConfigError, HeadError

if TYPE_CHECKING:
    from vlprompt.runs.run import Run

RUN_CONFIG = "config.yaml"
HEAD_FOLDER, HEAD_CONFIG = "head", "config.json"
UNKNOWN = "unknown"
"""The answer in the table of predictions for an image below the threshold."""


# -- training -----------------------------------------------------------------------------------------------------
TRAIN_FLAGS, TRAIN_OPTIONS = ("print-config", "dry-run", "force"), ("metrics",)


def train_command(words: list[str]) -> int:
    """Run ``vlprompt train`` and return its exit status."""
    line = read_command_line(words, "train", flags=TRAIN_FLAGS, options=TRAIN_OPTIONS)
    need_config(line)
    config, problems = check_run(line)
    if config is None or problems:
        refuse(problems, "train")
    metrics = metrics_on(line, config)
    if "print-config" in line.flags:
        given = source_of(line).given()
        show(to_yaml(config, lambda key: origin_of(given, key)), end="")
        return 0
    if "dry-run" in line.flags:
        from vlprompt.runs.dry_run import dry_run

        show(dry_run(config))
        return 0
    from vlprompt.runs.run import run

    result = run(config, force="force" in line.flags)
    lines = [result.table(metrics), *_validation(result), f"head:       {result.head_dir}"]
    lines += [f"by class:   {path}" for path in result.class_tables]
    say("\n".join([*lines, f"run folder: {result.folder}"]))
    return 0


def _validation(result: Run) -> list[str]:
    """Return the lines about scores on validation images, if there are any."""
    from vlprompt.runs.tables import validation_text

    try:
        values = result.validation()
    except ConfigError as error:
        return [f"validation: {error}"]
    if not values:
        return []
    return [validation_text(values, str(result.results["data"].get("metric", "accuracy")), result.selected)]


def train_keys_help(words: list[str]) -> str:
    """Return the accepted keys, and the settings if the command has a method or a readable configuration."""
    text = f"\nKeys, defaults and what they accept:\n{key_table()}\n"
    words = [word for word in words if word not in ("-h", "--help")]
    line = read_command_line(words, flags=TRAIN_FLAGS, options=TRAIN_OPTIONS)
    if not line.configs and not line.overrides:
        return text + "\nWith --method NAME or --config FILE this help also lists the method's --settings.* keys.\n"
    config, problems = check_run(line)
    if config is None or problems:
        refuse(problems, "train")
    from vlprompt.methods.registry import get_method_class

    settings = get_method_class(config.method).Settings
    return f"{text}\nSettings of {config.method}:\n{key_table(settings)}\n"


# -- saved heads: machine and backbone ---------------------------------------------------------------------------------
MACHINE_OPTIONS = ("device", "workers")
DEVICES: Mapping[str, Literal["auto", "cpu", "gpu"]] = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}


def _device(line: CommandLine) -> str:
    """Return ``--device``; what is not accepted becomes a problem of ``line``."""
    device = line.options.get("device", "auto")
    if device not in DEVICES:
        card = " A card is chosen by CUDA_VISIBLE_DEVICES." if device.startswith(("cuda", "gpu")) else ""
        line.problems.append(f"{COMMAND_LINE}: --device is {shown(device)}; accepted: {', '.join(DEVICES)}.{card}")
        return "auto"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            line.problems.append(f"{COMMAND_LINE}: --device is cuda, and no GPU is available; accepted: auto, cpu")
    return device


def given_backbone(line: CommandLine, backbone: BackboneConfig) -> dict[str, Any]:
    """Return the fields of ``backbone`` that the command line gives."""
    names = [key.removeprefix("backbone.") for key in line.overrides if key.startswith("backbone.")]
    return {name: getattr(backbone, name) for name in names}


# -- saved heads --------------------------------------------------------------------------------------------------
def head_folder(text: str) -> Path:
    """Return the head folder of RUN: ``head`` in a run folder, or the folder itself.

    Raises:
        HeadError: It is neither; the text describes what is there.
    """
    folder = Path(text)
    if os.path.isfile(folder / HEAD_FOLDER / HEAD_CONFIG):
        return folder / HEAD_FOLDER
    if os.path.isfile(folder / HEAD_CONFIG):
        return folder
    if os.path.isfile(folder):
        raise HeadError(f"RUN {shown(text)} is a file; give a run folder or a head folder")
    if not os.path.isdir(folder):
        raise HeadError(f"RUN {shown(text)}: there is no such folder; give a run folder or a head folder")
    if os.path.isfile(folder / RUN_CONFIG):
        raise HeadError(
            f"RUN {text!r} holds no head yet: the run is not finished. Resume it with: "
            f"vlprompt train --config {folder / RUN_CONFIG}"
        )
    raise HeadError(f"RUN {text!r} holds neither {HEAD_FOLDER}/{HEAD_CONFIG} (a run) nor {HEAD_CONFIG} (a head)")


_OF_TRAINING = {f"data.{name}" for name in ("shots", "transform", "cached_views", "sampler", "shots_file")}
"""Keys without effect on the evaluation of a saved head."""


def eval_command(words: list[str]) -> int:
    """Run ``vlprompt eval`` and return its exit status."""
    if any(word.partition("=")[0] == "--protocol" for word in words):
        return protocol_command(words)
    line = read_command_line(words, "eval", options=("metrics", *MACHINE_OPTIONS), operands=True)
    if "workers" in line.options:
        line.overrides.setdefault("data.workers", line.options["workers"])
    device = _device(line)
    head, files = None, []
    if len(line.operands) != 1:
        line.problems.append(f"{COMMAND_LINE}: eval takes one RUN folder, got {len(line.operands)}")
    else:
        head = _head_or_problem(line)
        files = [str(path) for path in _run_config(Path(line.operands[0]))]
    if line.configs:
        line.problems.append(f"{COMMAND_LINE}: --config has no meaning for `vlprompt eval`: the head says what it is")
    if head is not None and not files and "data.name" not in line.overrides:
        line.problems.append(f"{COMMAND_LINE}: {str(head)!r} is a head without its run; say --data.name NAME")
    for key in filter(_OF_TRAINING.__contains__, line.overrides):
        if line.overrides[key] in WHOLE_TRANSFORMS:  # they apply to test images
            continue
        line.problems.append(f"{COMMAND_LINE}: --{key} has no meaning for `vlprompt eval`: it is about training images")
    config, problems = check_run(line, files, within=("data.", "backbone.", "seed"))
    if config is None or problems or head is None:
        refuse(problems, "eval")
    metrics = metrics_on(line, config)
    from vlprompt.runs.run import evaluate_head

    trainer = TrainerConfig(progress=False, accelerator=DEVICES[device])
    scores = evaluate_head(
        head, config.data, config.seed, trainer=trainer, backbone=given_backbone(line, config.backbone)
    )
    if "seed" in line.overrides and scores.get("seed_draws") == []:
        warnings.warn(f"seed {config.seed}: nothing is drawn at random in the test of this head", stacklevel=2)
    oracle = " (oracle: its hyperparameters were chosen on test images)" if scores.get("oracle") else ""
    show(f"{config.data.name}, {config.data.classes} classes: {_in_words(scores, metrics)}{oracle}")
    return 0


def _in_words(scores: Mapping[str, Any], metrics: Sequence[str] = ()) -> str:
    """Return the ``metrics`` of a head's scores as text; without them the headline and, if not accuracy, the others."""
    from vlprompt.engine.metrics import METRICS, headline, measured

    if metrics:
        values = ", ".join(f"{METRICS[name]} {measured(scores, name):.2f} %" for name in metrics)
        return f"{values} ({scores['total']} images)"
    if "metric" not in scores:
        return f"{headline(scores):.2f} % ({scores['correct']}/{scores['total']} images)"
    headline_metric = scores["metric"]
    others = [
        f"{words} {scores[name]:.2f}" for name, words in METRICS.items() if name in scores and name != headline_metric
    ]
    return f"{METRICS[headline_metric]} {headline(scores):.2f} % ({', '.join(others)}; {scores['total']} images)"


def _head_or_problem(line: CommandLine) -> Path | None:
    try:
        return head_folder(line.operands[0])
    except HeadError as error:
        line.problems.append(f"{COMMAND_LINE}: {error}")
        return None


def _run_config(folder: Path) -> list[Path]:
    """Return the configuration file of a run folder, or of the run of a head folder, if it exists."""
    run_folder = folder.resolve().parent if folder.resolve().name == HEAD_FOLDER else folder
    return [run_folder / RUN_CONFIG] if os.path.lexists(run_folder / RUN_CONFIG) else []


def predict_command(words: list[str]) -> int:
    """Run ``vlprompt predict`` and return its exit status."""
    options = ("top", "scores", "unknown", *MACHINE_OPTIONS)
    line = read_command_line(words, "predict", flags=("json",), options=options, operands=True)
    config, problems = check_run(line, [], within=("backbone.", "data.orientation", "data.background"))
    line.problems += [text for text in problems if text not in line.problems]
    if line.configs:
        line.refuse("config", ())
    device, workers = _device(line), line.options.get("workers", "0")
    if not re.fullmatch(r"[0-9]{1,3}", workers):
        line.problems.append(f"{COMMAND_LINE}: --workers is {shown(workers)}; accepted: 0 to 999 threads")
    top = line.options.get("top", "5")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", top):
        line.problems.append(f"{COMMAND_LINE}: --top is {top!r}; accepted: a whole number of classes, 1 or more")
    scores, unknown = _scores(line)
    head = _head_or_problem(line) if line.operands else None
    if len(line.operands) < 2:
        missing = "IMAGE, at least one file or folder" if line.operands else "RUN and IMAGE"
        line.problems.append(f"{COMMAND_LINE}: missing {missing}: vlprompt predict RUN IMAGE...")
    if line.problems or head is None or config is None:
        refuse(line.problems, "predict")
    from vlprompt.runs.predict import predict
    from vlprompt.runs.session import device_of

    predictions = predict(
        head,
        [Path(name) for name in line.operands[1:]],
        int(top),
        device=device_of(TrainerConfig(accelerator=DEVICES[device])),
        workers=int(workers),
        backbone=given_backbone(line, config.backbone),
        orientation=config.data.orientation,
        background=config.data.background,
        scores=scores,
        unknown=unknown,
    )
    if "json" in line.flags:
        show_json(predictions, indent=2)
    else:
        _print_predictions(predictions)
    return 0


def _scores(line: CommandLine) -> tuple[Any, float | None]:
    """Return ``--scores`` and ``--unknown``; what is not accepted becomes a problem of ``line``."""
    scores, text = line.options.get("scores", "probability"), line.options.get("unknown")
    if not line.options.keys() & {"scores", "unknown"}:
        return scores, None
    from vlprompt.runs.predict import check_scores

    number = text is None or re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text)
    if text is not None and not number:
        line.problems.append(
            f"{COMMAND_LINE}: --unknown is {shown(text)}; accepted: a number from 0 to 1, or from -1 to 1 with "
            "--scores cosine"
        )
    unknown = float(text) if text is not None and number else None
    try:
        check_scores(scores, unknown)
    except ConfigError as error:
        line.problems.append(f"{COMMAND_LINE}: {error}")
    return scores, unknown


def _print_predictions(predictions: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    score = next(name for name in ("probability", "cosine") if name in predictions[0]["classes"][0])
    answers = ["answer"] if "unknown" in predictions[0] else []
    table = Table("image", *answers, "class", box=None, pad_edge=False)
    table.add_column(score, justify="right")
    for entry in predictions:
        for rank, guess in enumerate(entry["classes"]):
            value = guess[score]
            first = [str(entry["path"]), *(UNKNOWN if entry["unknown"] else guess["name"] for _ in answers)]
            text = f"{100 * value:.1f} %" if score == "probability" else f"{value:.4f}"
            table.add_row(*(["" for _ in first] if rank else first), guess["name"], text)
    show(text_of(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000))
