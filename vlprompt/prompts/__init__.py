"""Learnable tensors and the token layouts they stand in; nothing here knows an objective."""

from vlprompt.prompts.adapter import FeatureAdapter
from vlprompt.prompts.context import CONTEXT_STD, TextContext, context_layout, template_layout
from vlprompt.prompts.deep import CoupledPrompts, DeepContext, MetaNet, VisualPrompts
from vlprompt.prompts.mixture import ExpertContexts
from vlprompt.prompts.norms import TunedLayerNorms
from vlprompt.prompts.words import check_class_names, check_templates, words_of

__all__ = [
    "CONTEXT_STD",
    "CoupledPrompts",
    "DeepContext",
    "ExpertContexts",
    "FeatureAdapter",
    "MetaNet",
    "TextContext",
    "TunedLayerNorms",
    "VisualPrompts",
    "check_class_names",
    "check_templates",
    "context_layout",
    "template_layout",
    "words_of",
]
