"""Fixtures: small images, preprocessing and a toy task."""

from tests.fixtures.data import paint, preprocess, toy_task

__all__ = ["paint", "preprocess", "toy_task"]
