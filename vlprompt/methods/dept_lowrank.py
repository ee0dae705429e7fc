"""DePT: a short context and a low-rank update of the class tokens (Shi and Lipani, ICLR 2024; arXiv 2309.05173).

Decomposed Prompt Tuning, not Decoupled Prompt Tuning, which CLIP users know as DePT. The prompt of class c is
``[v_1] ... [v_M] [class c + alpha / sqrt(r) A B] .``: row j of the product is added to the j-th token of every name.

The paper is about language models. This is a reconstruction on CLIP with CoOp as the base method, trained only by
cross-entropy. Any method that learns text prompts supports the update by ``decomposition: {dept_lowrank: {}}``. It also
changes the names of new classes, so evaluate on those.
"""

from __future__ import annotations

from vlprompt.config.types import validated
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.prompts.context import ContextLength
from vlprompt.prompts.decomposed import DePTDecompositionSettings


@validated("settings")
class DePTSettings(CoOpSettings):
    """Settings of CoOp, the base method, and of the update.

    With the defaults, 2,048 + 5,890 numbers on ViT-B/16, fewer than CoOp's 8,192 with 16 vectors.

    Attributes:
        context_length: M, when no words are given.
        context_init: Initial words, as the paper initialises short prompts from the vocabulary.
        class_specific: Use separate vectors for every class instead of shared vectors.
        class_token_position: Position of the class name.
        dept_lowrank: The low-rank update.
    """

    context_length: ContextLength = 4
    context_init: str = "a photo of a"
    dept_lowrank: DePTDecompositionSettings = DePTDecompositionSettings()


@register("dept_lowrank")
class DePT(CoOp):
    """CoOp with the decomposition ``dept_lowrank``."""

    checked = "reconstruction"
    Settings = DePTSettings
    settings: DePTSettings
