"""Fixtures: runs of seconds on a folder of small images."""

from tests.fixtures.runs import cache, folder_of, image_folder, one_demo, tiny

__all__ = ["cache", "folder_of", "image_folder", "one_demo", "tiny"]
