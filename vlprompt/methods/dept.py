"""DePT: a short context and a low-rank update of the class tokens (Shi and Lipani, ICLR 2024; arXiv 2309.05173).

Decomposed Prompt Tuning, not the decoupled one of the same letters. The prompt of class c is
``[v_1] ... [v_M] [class c + alpha / sqrt(r) A B] .``: row j of the product is added to the j-th token of every name.

The paper is about language models; this is a reconstruction on CLIP (seed_methods 11.1) with CoOp as the host, trained
by cross-entropy alone. Any method that learns text prompts takes the same update, by ``decomposition: {dept: {}}``. It
moves the names of new classes too, so measure those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlprompt.config.types import validated
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.prompts.context import ContextLength


@validated("settings")
class DePTSettings(CoOpSettings):
    """Settings of DePT's host, CoOp; the update's stand under ``decomposition.dept``.

    With the defaults, 2,048 + 5,890 numbers on ViT-B/16, no more than CoOp's 8,192 with 16 vectors.

    Attributes:
        context_length: M, when no words are given.
        context_init: Words to start from, as the paper starts short prompts from the vocabulary.
        class_specific: A set of vectors for every class instead of one for all.
        class_token_position: Where the class name stands.
    """

    context_length: ContextLength = 4
    context_init: str = "a photo of a"


@register("dept")
class DePT(CoOp):
    """CoOp with the decomposition ``dept``."""

    checked = "reconstruction"
    Settings = DePTSettings
    own_decomposition: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dept": {}}
    settings: DePTSettings
