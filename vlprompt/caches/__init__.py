"""Training-free caches on frozen features, and their trained variants: fit, predict, score, search.

Everything here takes features and labels, tensors in and tensors out; nothing knows images, prompts or data sets.
"""

from vlprompt.caches.ape import APE
from vlprompt.caches.base import FeatureClassifier, KeyValueCache, class_sums
from vlprompt.caches.gda import GDA
from vlprompt.caches.search import SearchResult, decades, grid
from vlprompt.caches.tfup import TFUP, cache_shots
from vlprompt.caches.tfup_trained import TFUP_T_RECIPE, Adaptation, TFUPTrained
from vlprompt.caches.tip_adapter import TIP_ADAPTER_F_RECIPE, TipAdapter, TipAdapterF
from vlprompt.caches.training import CacheRecipe, TrainingStep

__all__ = [
    "APE",
    "GDA",
    "TFUP",
    "TFUP_T_RECIPE",
    "TIP_ADAPTER_F_RECIPE",
    "Adaptation",
    "CacheRecipe",
    "FeatureClassifier",
    "KeyValueCache",
    "SearchResult",
    "TFUPTrained",
    "TipAdapter",
    "TipAdapterF",
    "TrainingStep",
    "cache_shots",
    "class_sums",
    "decades",
    "grid",
]
