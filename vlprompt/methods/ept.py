"""EPT: DePT whose context absorbs the update and is re-weighted in subspaces (Lan et al., AAAI 2025; arXiv 2405.11464).

Efficient Prompt Tuning: the short context P attends to the low-rank update K ("prompt fusion"), and what results is
projected into subspaces that a gate weighs ("multi-space projection"). The equations stand in
:class:`vlprompt.prompts.decomposed.EPTDecomposition`.

The paper is about language models, and neither its code nor its equations could be had: this is EPT-style, a
reconstruction on CLIP (seed_methods 11.2) that claims none of its numbers. The host is CoOp, trained by cross-entropy
alone; any method that learns text prompts takes the same, by ``decomposition: {ept: {}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlprompt.methods.dept import DePT
from vlprompt.methods.registry import register


@register("ept")
class EPT(DePT):
    """CoOp with the decomposition ``ept``."""

    own_decomposition: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ept": {}}
