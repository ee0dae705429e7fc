"""Import of diffusers and transformers, which only image generation needs."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from vlprompt.errors import ConfigError

#: Older versions run code of a pipeline's folder without asking (GHSA-98h9-4798-4q5v, GHSA-7wx4-6vff-v64p).
_OLDEST = (0, 38)


def import_diffusers() -> tuple[Any, Any]:
    """Return the modules diffusers and transformers.

    Raises:
        ConfigError: If one of them is not installed, or diffusers is too old.
    """
    try:
        libraries = import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"Generating images needs diffusers and transformers, which cannot be imported ({error}): "
            "pip install 'vlprompt[diffusion]'"
        ) from error
    installed = libraries[0].__version__
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(
            f"diffusers {installed} can run code from the folder of a pipeline; accepted: {oldest} or later. "
            f"pip install -U 'diffusers>={oldest}'"
        )
    return libraries


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, logs and warnings of diffusers and transformers."""
    logs = [module.utils.logging for module in import_diffusers()]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()
