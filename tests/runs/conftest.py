"""Fixtures: runs of seconds on a folder of small pictures."""

from tests.fixtures.runs import cache, command, folder_of, pictures, tiny

__all__ = ["cache", "command", "folder_of", "pictures", "tiny"]
