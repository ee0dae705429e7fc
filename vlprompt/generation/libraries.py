"""Import of diffusers and transformers, which only image generation needs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from vlprompt.errors import ConfigError


def import_diffusers() -> tuple[Any, Any]:
    """Return the modules diffusers and transformers.

    Raises:
        ConfigError: If one of them is not installed.
    """
    try:
        return import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"Generating images needs diffusers and transformers, which cannot be imported ({error}): "
            "pip install 'vlprompt[diffusion]'"
        ) from error


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
