"""Fixtures: small images, preprocessing and a toy task; one demo backbone for all commands."""

from tests.fixtures.data import paint, preprocess, toy_task
from tests.fixtures.runs import one_demo

__all__ = ["one_demo", "paint", "preprocess", "toy_task"]
