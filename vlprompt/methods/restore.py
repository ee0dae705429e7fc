"""RESTORE: text and image prompts whose features shift alike (arXiv 2403.06136; official code: Yaphabates/RESTORE_).

MaPLe's prompts with two objectives: ``shift_consistency``, which keeps the shifts of text and image equal, and
``surgery``, residual adapters that limit a common growth of both. The paper defines shifts of embeddings; the code of
the published results uses the norms of the prompts' Gram matrices instead. ``variant`` of ``shift_consistency``
selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import validated
from vlprompt.methods.maple import MaPLe, MaPLeSettings
from vlprompt.methods.registry import register
from vlprompt.objectives.shift import ShiftConsistencySettings, SurgerySettings


@validated("settings")
class RESTORESettings(MaPLeSettings):
    """Settings of RESTORE; ratios and weight differ by data set in the official scripts: see ``configs/restore``.

    Attributes:
        context_length: M text vectors and image tokens.
        context_init: Initial words.
        depth: J layers of both towers.
        surgery: The residual adapters; None to disable.
        shift_consistency: The consistency term.
    """

    surgery: SurgerySettings | None = SurgerySettings(text_ratio=0.1, image_ratio=0.1)
    shift_consistency: ShiftConsistencySettings = ShiftConsistencySettings(weight=1.0)
    renamed: ClassVar[Mapping[str, str]] = {
        "shift_weight": "shift_consistency.weight",
        "variant": "shift_consistency.variant",
        "text_ratio": "surgery.text_ratio",
        "image_ratio": "surgery.image_ratio",
    }


@register("restore")
class RESTORE(MaPLe):
    """MaPLe with the objectives ``surgery`` and ``shift_consistency``."""

    Settings = RESTORESettings
    recipe = RecipeConfig(epochs=10, batch_size=4, lr=0.0035)
    settings: RESTORESettings
