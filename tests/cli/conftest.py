"""Fixtures: small images, preprocessing, a toy task, one demo backbone for all commands, and commands that fail."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.fixtures.data import paint, preprocess, toy_task
from tests.fixtures.runs import one_demo
from vlprompt.cli.main import main

__all__ = ["fails", "one_demo", "paint", "preprocess", "toy_task"]


@pytest.fixture
def fails(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fails(*argv)``: the text on standard error of a command that must end with 2 and call and print nothing."""

    def check(*argv: str) -> str:
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith("vlprompt: error: ") and not out and not calls
        assert len(err.splitlines()) <= 30 and len(err) < 2500
        return err

    return check
