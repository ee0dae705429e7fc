"""EPT: DePT whose context absorbs the update and is re-weighted in subspaces (Lan et al., AAAI 2025; arXiv 2405.11464).

Efficient Prompt Tuning: the short context P attends to the low-rank update K ("prompt fusion"), and the result is
projected into subspaces weighted by a gate ("multi-space projection"). The equations are those of
:class:`vlprompt.prompts.decomposed.EPTDecomposition`.

The paper is about language models, and neither code nor equations were available: this is a reconstruction on CLIP that
does not reproduce published numbers. The base method is CoOp, trained only by cross-entropy. Any method that learns
text prompts supports EPT by ``decomposition: {ept: {}}``.
"""

from __future__ import annotations

from vlprompt.config.types import validated
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.prompts.context import ContextLength
from vlprompt.prompts.decomposed import EPTDecompositionSettings


@validated("settings")
class EPTSettings(CoOpSettings):
    """Settings of CoOp, the base method, and of the decomposition.

    Attributes:
        context_length: M, when no words are given.
        context_init: Initial words.
        class_specific: Use separate vectors for every class instead of shared vectors.
        class_token_position: Position of the class name.
        ept: Update, fusion and subspaces.
    """

    context_length: ContextLength = 4
    context_init: str = "a photo of a"
    ept: EPTDecompositionSettings = EPTDecompositionSettings()


@register("ept")
class EPT(CoOp):
    """CoOp with the decomposition ``ept``."""

    checked = "reconstruction"
    Settings = EPTSettings
    settings: EPTSettings
