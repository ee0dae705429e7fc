"""The command line: ``vlprompt train | eval | search | predict | list | ...``.

Errors that a user can fix are printed as plain text with status 2; so are a full disk, a missing permission and a lack
of memory. Commands end with status 130 on Ctrl-C, 143 on SIGTERM, and 141 if nobody reads their output. Any other
exception is a bug and keeps its traceback. Heavy imports (torch, lightning, open_clip) stay inside the commands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from vlprompt._dist import check_launcher, local_rank
from vlprompt._terminal import flush, show, show_problem
from vlprompt.errors import ConfigError, OutputError, Terminated, VlpromptError, did_you_mean
from vlprompt.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: ``sys.argv[1:]``) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    resumes = bool(words) and words[0] in COMMANDS and COMMANDS[words[0]].resumes
    try:
        check_launcher()
    except VlpromptError as error:
        show_problem(f"vlprompt: error: {error}")
        return 2
    try:
        with _notes(), _terminable(resumes):
            status = _dispatch(words)
            flush()  # a full disk is reported here, not after the end
            return status
    except OutputError as error:
        return 141 if error.closed else _failed(str(error))
    except VlpromptError as error:
        return _failed(str(error))
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        if local_rank() == 0:
            show(_stopped("terminated" if terminated else "stopped", resumes), error=True)
        return 143 if terminated else 130
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        return _failed(problem + (" The same command resumes." if resumes else ""))


def _failed(text: str) -> int:
    """Print an error and return the exit status."""
    rank = local_rank()
    program = f"vlprompt (process {rank})" if rank else "vlprompt"
    show_problem(f"{program}: error: {text}")
    return 2


def machine_problem(error: BaseException) -> str | None:
    """Return the description and the remedy if ``error`` is a problem of the machine, else None.

    These are errors of the file system, and a lack of memory, which torch reports as a RuntimeError, the loader of
    shared libraries as an ImportError and, under a limit of addresses, Python as a SystemError.
    """
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = f"{place or 'a file, or standard output'}: {error.strerror}"
        return f"{reason}. {_REMEDIES[error.errno]} Finished files are unchanged."
    text = str(error)
    if isinstance(error, RuntimeError) and any(part in text for part in _LOST):
        return "another process of this command has ended, and this one lost its connection to it."
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    memory |= isinstance(error, RuntimeError | ImportError) and any(part in text for part in _OUT_OF_MEMORY)
    memory |= isinstance(error, SystemError | ImportError) and _addresses() is not None
    if memory:
        line = text.strip().splitlines()[0][:300] if text.strip() else "an allocation failed"
        return (
            f"out of memory ({line}). Use smaller batches (--recipe.batch_size, --recipe.test_batch_size), fewer "
            "loader processes (--data.workers 0) or a machine with more memory. Finished files are unchanged."
        )
    return None


_SPACE = "Free some space, or choose another place: --output FOLDER, VLPROMPT_CACHE=FOLDER."
_ACCESS = "Change the permissions, or choose another place: --output FOLDER, VLPROMPT_CACHE=FOLDER."
_KIND = "Move it aside."
_REMEDIES: dict[int | None, str] = {
    **{errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: "The limit is that of `ulimit -f` or the file system."},
    **{errno.EACCES: _ACCESS, errno.EPERM: _ACCESS, errno.EROFS: _ACCESS},
    **{errno.EISDIR: _KIND, errno.ENOTDIR: _KIND, errno.ENOTEMPTY: _KIND, errno.EEXIST: _KIND, errno.ELOOP: _KIND},
    **{errno.ENOENT: "Was it moved or removed while the command ran?"},
    **{errno.EMFILE: "Raise `ulimit -n`, or use --data.workers 0.", errno.ENFILE: "Close other programs."},
    **{errno.EIO: "Check the disk.", errno.ESTALE: "Check the network drive.", errno.ENAMETOOLONG: "Shorten the name."},
    **{errno.ENOMEM: "Use --data.workers 0 or a machine with more memory.", errno.EAGAIN: "Raise `ulimit -u`."},
}
"""Errors of the file system and the operating system that are not bugs, and what to do about them."""
_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "annot allocate memory", "failed to map segment"),
    *("shared memory", "is killed by signal: Killed"),  # of the processes that load images
)
_LOST = ("Connection closed by peer", "Connection reset by peer")


def _stopped(word: str, resumes: bool) -> str:
    return f"vlprompt: {word}" + ("; the same command resumes it" if resumes else "")


@contextlib.contextmanager
def _terminable(resumes: bool) -> Iterator[None]:
    """Raise Terminated on SIGTERM, which otherwise ends the process without a word; the old handler comes back.

    Modules that are being imported may catch it (numpy's lazy submodules do). Nothing is being written then, so the
    process ends at once; it also does at a second SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    asked: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1 or _importing(frame):
            if local_rank() == 0:
                os.write(2, f"{_stopped('terminated', resumes)}\n".encode())
            os._exit(143)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in ``frame`` or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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
            show_problem(f"vlprompt: note: {text}")

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
    _note_limit()
    status: int = _load(command.call)(words[1:])
    return status


def _note_limit() -> None:
    """Note a small limit of the address space: torch ends a process that reaches it (abort), without an exception."""
    if (limit := _addresses()) is not None and not local_rank():
        show(
            f"vlprompt: note: `ulimit -v` limits the addresses of this process to {limit / 2**30:.1f} GiB. torch "
            f"reserves up to {_RESERVED / 2**30:.0f} and aborts (std::bad_alloc) if it gets less. If that happens: "
            "ulimit -v unlimited",
            error=True,
        )


def _addresses() -> int | None:
    """Return the limit of the address space in bytes if torch may reach it, else None."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit if limit != resource.RLIM_INFINITY and limit < _RESERVED else None


_RESERVED = 6 * 2**30


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
