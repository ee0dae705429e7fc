"""The command line: ``vlprompt train | eval | search | predict | list | ...``; a few lines of Python each.

What a user can put right is printed as plain text with status 2; an interrupted command ends with 130; anything else
is a bug and shows itself as one. Heavy imports (torch, lightning, open_clip) stay inside the commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._dist import local_rank
from vlprompt.cli.bank import BANK_HELP
from vlprompt.cli.bank import bank as bank_command
from vlprompt.cli.cache import CACHE_HELP
from vlprompt.cli.cache import cache as cache_command
from vlprompt.cli.data import DATA_HELP
from vlprompt.cli.data import data as data_command
from vlprompt.cli.help import (
    BASE_TO_NEW_HELP,
    COMPARE_HELP,
    DOMAINS_HELP,
    EVAL_HELP,
    LIST_HELP,
    PREDICT_HELP,
    SEARCH_HELP,
    TRAIN_HELP,
)
from vlprompt.cli.meta import META_EVAL_HELP, META_HELP, meta_eval_command, meta_keys_help, meta_train_command
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, check_run, key_table, read_command_line, refuse
from vlprompt.cli.protocols import (
    base_to_new_command,
    compare_command,
    domains_command,
    need_config,
    need_no_config,
    protocol_command,
    say,
    search_command,
)
from vlprompt.config.keys import to_yaml
from vlprompt.config.yaml import shown
from vlprompt.errors import ConfigError, HeadError, VlpromptError, did_you_mean
from vlprompt.version import __version__

RUN_CONFIG = "config.yaml"
RESUMED = ("train", "meta-train", "meta-eval", "bank", "base-to-new", "domains", "eval", "search")
HEAD_FOLDER, HEAD_CONFIG = "head", "config.json"
KINDS = ("methods", "objectives", "decompositions", "datasets", "backbones", "protocols")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of ``argv`` (default: the process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _notes():
            return _dispatch(words)
    except VlpromptError as error:
        rank = local_rank()
        who = f"vlprompt (process {rank})" if rank else "vlprompt"
        print(f"{who}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = words[:1] and words[0] in RESUMED
        if local_rank() == 0:
            print("vlprompt: stopped" + ("; the same command resumes it" if resumes else ""), file=sys.stderr)
        return 130


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Show vlprompt's own warnings as notes: the text alone, once, without the place in the code where it arose."""
    told: set[str] = set()
    usual, here = warnings.showwarning, str(Path(__file__).parent.parent)

    def tell(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if not filename.startswith(here):
            usual(message, category, filename, *rest, **more)
        elif (text := str(message)) not in told:
            told.add(text)
            print(f"vlprompt: note: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"vlprompt {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(
            f"there is no command {words[0]!r}.{did_you_mean(words[0], COMMANDS)} See `vlprompt --help`."
            if not words[0].startswith("-")
            else f"a command comes first, not {words[0]!r}; commands: {', '.join(COMMANDS)}."
        )
    command = COMMANDS[words[0]]
    if "-h" in words[1:] or "--help" in words[1:]:
        more = {"train": _keys_help, "meta-train": meta_keys_help}.get(words[0])
        print(command.help + (more(words[1:]) if more else ""), end="")
        return 0
    return command.call(words[1:])


def _overview() -> str:
    rows = "\n".join(f"  {name:<13} {command.line}" for name, command in COMMANDS.items())
    return (
        f"vlprompt: adapt a frozen CLIP to your classes.\n\n{rows}\n\n"
        "`vlprompt COMMAND --help` tells more. Start with: vlprompt train --config mocoop/demo"
    )


def _keys_help(words: list[str]) -> str:
    """Return the accepted keys; the settings too, if the command names a method or a configuration that can be read."""
    text = f"\nKeys, defaults and what they accept:\n{key_table()}\n"
    line = read_command_line([word for word in words if word not in ("-h", "--help")], flags=TRAIN_FLAGS)
    if not line.configs and not line.overrides:
        return text + "\nWith --method NAME or --config FILE this help also lists the method's --settings.* keys.\n"
    config, problems = check_run(line)
    if config is None or problems:
        refuse(problems, "train")
    from vlprompt.methods.registry import get_method_class

    settings = get_method_class(config.method).Settings
    return f"{text}\nSettings of {config.method}:\n{key_table(settings)}\n"


# -- training -----------------------------------------------------------------------------------------------------
TRAIN_FLAGS = ("print-config", "dry-run", "force")


def _train(words: list[str]) -> int:
    line = read_command_line(words, "train", flags=TRAIN_FLAGS)
    need_config(line)
    config, problems = check_run(line)
    if config is None or problems:
        refuse(problems, "train")
    if "print-config" in line.flags:
        print(to_yaml(config), end="")
        return 0
    if "dry-run" in line.flags:
        from vlprompt.runs.dry_run import dry_run

        print(dry_run(config))
        return 0
    from vlprompt.runs.run import run

    result = run(config, force="force" in line.flags)
    say(f"{result.table()}\nhead:       {result.head_dir}\nrun folder: {result.folder}")
    return 0


# -- saved heads --------------------------------------------------------------------------------------------------
def head_folder(text: str) -> Path:
    """Return the head folder that RUN means: a run folder's ``head``, or the folder itself.

    Raises:
        HeadError: Neither; the text says what is there instead.
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


def _eval(words: list[str]) -> int:
    if any(word.partition("=")[0] == "--protocol" for word in words):
        return protocol_command(words)
    line = read_command_line(words, "eval", operands=True)
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
    config, problems = check_run(line, files, within=("data.", "seed"))
    if config is None or problems or head is None:
        refuse(problems, "eval")
    from vlprompt.runs.run import evaluate_head

    scores = evaluate_head(head, config.data, config.seed)
    oracle = " (oracle: its hyperparameters were chosen on test images)" if scores.get("oracle") else ""
    print(f"{config.data.name}, {config.data.classes} classes: {_in_words(scores)}{oracle}")
    return 0


def _in_words(scores: Mapping[str, Any]) -> str:
    """Return the headline number of a head's scores, and what else was measured."""
    from vlprompt.engine.metrics import METRICS, headline

    if "metric" not in scores:
        return f"{headline(scores):.2f} % ({scores['correct']}/{scores['total']} images)"
    named = {"accuracy": "accuracy", "cf1": "CF1", "of1": "OF1", **METRICS}
    own = scores["metric"]
    others = [f"{words} {scores[name]:.2f}" for name, words in named.items() if name in scores and name != own]
    return f"{named[own]} {headline(scores):.2f} % ({', '.join(others)}; {scores['total']} images)"


def _head_or_problem(line: CommandLine) -> Path | None:
    try:
        return head_folder(line.operands[0])
    except HeadError as error:
        line.problems.append(f"{COMMAND_LINE}: {error}")
        return None


def _run_config(folder: Path) -> list[Path]:
    """Return the resolved configuration of the run that ``folder`` is, or is the head folder of, if it is there."""
    own = folder.resolve().parent if folder.resolve().name == HEAD_FOLDER else folder
    return [own / RUN_CONFIG] if os.path.isfile(own / RUN_CONFIG) else []


def _predict(words: list[str]) -> int:
    line = read_command_line(words, "predict", flags=("json",), options=("top",), operands=True)
    need_no_config(line)
    top = line.options.get("top", "5")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", top):
        line.problems.append(f"{COMMAND_LINE}: --top is {top!r}; accepted: a whole number of classes, 1 or more")
    head = _head_or_problem(line) if line.operands else None
    if len(line.operands) < 2:
        missing = "IMAGE, at least one file or folder" if line.operands else "RUN and IMAGE"
        line.problems.append(f"{COMMAND_LINE}: missing {missing}: vlprompt predict RUN IMAGE...")
    if line.problems or head is None:
        refuse(line.problems, "predict")
    from vlprompt.runs.predict import predict

    found = predict(head, [Path(name) for name in line.operands[1:]], int(top))
    if "json" in line.flags:
        print(json.dumps(found, indent=2, ensure_ascii=False, default=str))
    else:
        _print_predictions(found)
    return 0


def _print_predictions(found: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("image", "class", box=None, pad_edge=False)
    table.add_column("probability", justify="right")
    for entry in found:
        for rank, guess in enumerate(entry["classes"]):
            table.add_row("" if rank else str(entry["path"]), guess["name"], f"{100 * guess['probability']:.1f} %")
    # File and class names are texts, whatever brackets or colons they hold.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table, width=None if console.is_terminal else 10_000)


# -- lists --------------------------------------------------------------------------------------------------------
def _list(words: list[str]) -> int:
    line = read_command_line(words, "list", flags=("names", "markdown"), operands=True)
    need_no_config(line)
    kind, pattern = ([*line.operands, "", ""])[:2]
    if not kind:
        line.problems.append(f"{COMMAND_LINE}: list what? Accepted: {', '.join(KINDS)}")
    elif kind not in KINDS:
        line.problems.append(f"{COMMAND_LINE}: there is no list {kind!r}.{did_you_mean(kind, KINDS)}")
    for extra in line.operands[2:]:
        line.problems.append(f"{COMMAND_LINE}: {extra!r} is one word too many (quote the pattern)")
    if line.problems:
        refuse(line.problems, "list")
    names = _names(kind)
    found = names(pattern or "*")
    if not found:
        raise ConfigError(f"none of the {kind} matches {pattern!r}.{did_you_mean(pattern.strip('*'), names('*'))}")
    if kind == "methods" and "names" not in line.flags:
        _print_methods(found, "markdown" in line.flags)
    elif kind in ("objectives", "decompositions"):
        from vlprompt.objectives import get_objective_class
        from vlprompt.prompts import get_decomposition_class

        class_of: Callable[[str], type] = get_objective_class if kind == "objectives" else get_decomposition_class
        rows = [(name, (class_of(name).__doc__ or "").splitlines()[0]) for name in found]
        print("\n".join(name if "names" in line.flags else f"{name:<20} {about}" for name, about in rows))
    else:
        print("\n".join(found))
    return 0


def _print_methods(names: list[str], as_markdown: bool) -> None:
    from vlprompt.protocols.capabilities import ARCHITECTURE, HEADINGS, capabilities, cells, markdown

    found = capabilities(names)
    if as_markdown:
        print(markdown(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADINGS[:-2], box=None, pad_edge=False)
    table.add_column(f"parameters on {ARCHITECTURE}", justify="right")
    table.add_column(HEADINGS[-1])
    for one in found:
        table.add_row(*cells(one))
    Console(width=140, markup=False, highlight=False).print(table)


def _names(kind: str) -> Callable[[str], list[str]]:
    if kind == "methods":
        from vlprompt.methods import list_methods

        return list_methods
    if kind == "datasets":
        from vlprompt.datasets import list_datasets

        return list_datasets
    if kind in ("objectives", "decompositions"):
        import fnmatch

        from vlprompt.objectives import list_objectives
        from vlprompt.prompts import list_decompositions

        known = list_objectives() if kind == "objectives" else list_decompositions()
        return lambda pattern: fnmatch.filter(known, pattern)
    if kind == "protocols":
        from vlprompt.protocols.protocol_files import list_protocols

        return list_protocols
    from vlprompt.backbone import list_backbones

    return list_backbones


@dataclass(frozen=True)
class Command:
    """One command: what it does in a line, its help, and the function that runs it."""

    line: str
    help: str
    call: Callable[[list[str]], int]


COMMANDS: dict[str, Command] = {
    "train": Command("train and evaluate a method, keep its head", TRAIN_HELP, _train),
    "meta-train": Command("learn a start and a gradient regulator across tasks (GRAM)", META_HELP, meta_train_command),
    "meta-eval": Command("what a learned start and regulator are worth", META_EVAL_HELP, meta_eval_command),
    "eval": Command("evaluate a saved head, or a protocol over data sets and seeds", EVAL_HELP, _eval),
    "base-to-new": Command(
        "train on base classes, score base and new ones over seeds", BASE_TO_NEW_HELP, base_to_new_command
    ),
    "domains": Command("train on some domains, score the others over seeds", DOMAINS_HELP, domains_command),
    "search": Command("choose hyperparameters on validation images", SEARCH_HELP, search_command),
    "compare": Command("say why two runs differ", COMPARE_HELP, compare_command),
    "predict": Command("classify images with a saved head", PREDICT_HELP, _predict),
    "bank": Command("make a diffusion model's pictures of a data set's images", BANK_HELP, bank_command),
    "cache": Command("list and prune stored image features", CACHE_HELP, cache_command),
    "data": Command("list, check, draw from and make data sets", DATA_HELP, data_command),
    "list": Command("list methods, data sets, backbones or protocols", LIST_HELP, _list),
}
