"""Saved heads as teachers of other methods, for :mod:`vlprompt.methods.teacher`."""

from __future__ import annotations

from pathlib import Path

from vlprompt.backbone import Backbone
from vlprompt.io.head import load_head
from vlprompt.io.head_files import find_head, read_config
from vlprompt.methods.base import PromptMethod


def method_of(folder: Path, student: Backbone) -> PromptMethod:
    """Return the trained method of a saved head or run, on the device of ``student``.

    It shares the backbone of the student if the weights are the same.

    Raises:
        HeadError: ``folder`` holds no head, or the head cannot be loaded.
    """
    folder = find_head(folder)
    same = read_config(folder).backbone.fingerprint == student.fingerprint
    return load_head(folder, student if same else None, device=str(student.device)).method


def dim_of(folder: Path) -> int:
    """Return the width of a saved head's features, without its weights.

    Raises:
        HeadError: ``folder`` holds no head.
    """
    return read_config(find_head(folder)).backbone.embed_dim
