"""Fixtures: one demo backbone for all heads."""

from tests.fixtures.runs import one_demo

__all__ = ["one_demo"]
