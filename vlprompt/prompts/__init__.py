"""Prompt modules and their token layouts, independent of objectives."""

from vlprompt.prompts.adapter import FeatureAdapter
from vlprompt.prompts.context import CONTEXT_STD, TextContext, context_layout, template_layout, text_layout
from vlprompt.prompts.decomposed import (
    Decomposition,
    get_decomposition_class,
    list_decompositions,
    register_decomposition,
)
from vlprompt.prompts.deep import CoupledPrompts, DeepContext, MetaNet, VisualPrompts
from vlprompt.prompts.diffusion import Diffusion
from vlprompt.prompts.draws import Draws
from vlprompt.prompts.experts import ExpertContexts
from vlprompt.prompts.inside import LowRank, Masks
from vlprompt.prompts.norms import TunedLayerNorms
from vlprompt.prompts.pixels import PixelPrompt
from vlprompt.prompts.projector import Projector
from vlprompt.prompts.unified import UnifiedPrompts
from vlprompt.prompts.words import check_class_names, words_of

__all__ = [
    "CONTEXT_STD",
    "CoupledPrompts",
    "Decomposition",
    "DeepContext",
    "Diffusion",
    "Draws",
    "ExpertContexts",
    "LowRank",
    "Masks",
    "FeatureAdapter",
    "MetaNet",
    "PixelPrompt",
    "Projector",
    "TextContext",
    "TunedLayerNorms",
    "UnifiedPrompts",
    "VisualPrompts",
    "check_class_names",
    "context_layout",
    "get_decomposition_class",
    "list_decompositions",
    "register_decomposition",
    "template_layout",
    "text_layout",
    "words_of",
]
