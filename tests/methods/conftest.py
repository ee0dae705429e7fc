"""Fixture: a folder of small images."""

from tests.fixtures.runs import image_folder

__all__ = ["image_folder"]
