"""The command line: ``vlprompt train | eval | search | predict | list | ...``.

Errors that a user can fix are printed as plain text with status 2. Interrupted commands end with status 130. Any other
exception is a bug and keeps its traceback. Heavy imports (torch, lightning, open_clip) stay inside the commands.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from vlprompt._dist import local_rank
from vlprompt._terminal import flush, show
from vlprompt.errors import ConfigError, OutputError, VlpromptError, did_you_mean
from vlprompt.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: ``sys.argv[1:]``) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _notes():
            status = _dispatch(words)
            flush()
            return status
    except OutputError as error:
        if not error.closed:
            show(f"vlprompt: error: {error}", error=True)
        return 1
    except VlpromptError as error:
        rank = local_rank()
        program = f"vlprompt (process {rank})" if rank else "vlprompt"
        show(f"{program}: error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        resumes = words and words[0] in COMMANDS and COMMANDS[words[0]].resumes
        if local_rank() == 0:
            show("vlprompt: stopped" + ("; the same command resumes it" if resumes else ""), error=True)
        return 130


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Show warnings of vlprompt as notes: each text once, without its source location."""
    shown: set[str] = set()
    usual, package = warnings.showwarning, str(Path(__file__).parent.parent)

    def note(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if not filename.startswith(package):
            usual(message, category, filename, *rest, **more)
        elif (text := str(message)) not in shown:
            shown.add(text)
            show(f"vlprompt: note: {text}", error=True)

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        show(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        show(f"vlprompt {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(
            f"there is no command {words[0]!r}.{did_you_mean(words[0], COMMANDS)} See `vlprompt --help`."
            if not words[0].startswith("-")
            else f"a command comes first, not {words[0]!r}; commands: {', '.join(COMMANDS)}."
        )
    command = COMMANDS[words[0]]
    if "-h" in words[1:] or "--help" in words[1:]:
        show(_load(command.help) + (_load(command.keys)(words[1:]) if command.keys else ""), end="")
        return 0
    status: int = _load(command.call)(words[1:])
    return status


def _overview() -> str:
    rows = "\n".join(f"  {name:<13} {command.line}" for name, command in COMMANDS.items())
    return (
        f"vlprompt: adapt a frozen CLIP to your classes.\n\n{rows}\n\n"
        "`vlprompt COMMAND --help` prints more. Start with: vlprompt train --config mocoop/demo"
    )


class Command(NamedTuple):
    """One command. Its modules are imported when it is called, to keep ``vlprompt --help`` fast.

    Attributes:
        line: One-line description.
        call: The function that runs it, ``module:name`` below ``vlprompt.cli``.
        help: Its help text, in the same form.
        keys: A function that returns additional help for a command line, in the same form; empty for none.
        resumes: Whether the same command resumes after an interrupt.
    """

    line: str
    call: str
    help: str
    keys: str = ""
    resumes: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train and evaluate a method, save its head",
        call="run:train_command",
        help="help:TRAIN_HELP",
        keys="run:train_keys_help",
        resumes=True,
    ),
    "meta-train": Command(
        "learn an initialisation and a gradient regulator across tasks (GRAM)",
        call="meta:meta_train_command",
        help="meta:META_HELP",
        keys="meta:meta_keys_help",
        resumes=True,
    ),
    "meta-eval": Command(
        "compare a learned initialisation and regulator with the default",
        call="meta:meta_eval_command",
        help="meta:META_EVAL_HELP",
        resumes=True,
    ),
    "eval": Command(
        "evaluate a saved head, or a protocol over data sets and seeds",
        call="run:eval_command",
        help="help:EVAL_HELP",
        resumes=True,
    ),
    "base-to-new": Command(
        "train on base classes, score base and new ones over seeds",
        call="protocols:base_to_new_command",
        help="help:BASE_TO_NEW_HELP",
        resumes=True,
    ),
    "domains": Command(
        "train on some domains, score the others over seeds",
        call="protocols:domains_command",
        help="help:DOMAINS_HELP",
        resumes=True,
    ),
    "search": Command(
        "choose hyperparameters on validation images",
        call="protocols:search_command",
        help="help:SEARCH_HELP",
        resumes=True,
    ),
    "compare": Command(
        "print the differences between two runs", call="protocols:compare_command", help="help:COMPARE_HELP"
    ),
    "predict": Command("classify images with a saved head", call="run:predict_command", help="help:PREDICT_HELP"),
    "bank": Command(
        "generate images of a data set's images with a diffusion model",
        call="bank:bank",
        help="bank:BANK_HELP",
        resumes=True,
    ),
    "cache": Command("list and prune stored image features", call="cache:cache", help="cache:CACHE_HELP"),
    "data": Command("list, check, draw from and make data sets", call="data:data", help="data:DATA_HELP"),
    "list": Command(
        "list methods, data sets, backbones or protocols", call="listing:list_command", help="help:LIST_HELP"
    ),
}


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(f"vlprompt.cli.{module}"), name)
