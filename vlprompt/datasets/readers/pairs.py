"""Reader of image-caption data sets, which have no classes: raises an error."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from vlprompt.datasets.card import Card
from vlprompt.datasets.report import Report
from vlprompt.errors import ConfigError


def refuse_pairs(card: Card, base: Path, report: Report) -> NoReturn:
    """Raise ConfigError: ``card`` has no classes, which :func:`vlprompt.load_dataset` needs."""
    del base, report
    raise ConfigError(
        f"{card.name!r} has captions, not classes: use vlprompt.load_pairs({card.name!r}). `vlprompt list datasets` "
        "shows all data sets."
    )
