"""Configurations: dataclasses, their files and their validation."""
