"""What learns on frozen features, or only looks them up: caches and linear classifiers; fit, predict, score, search.

Everything here takes features and labels, tensors in and tensors out; nothing knows images, prompts or data sets.
"""

from vlprompt.caches.ape import APE
from vlprompt.caches.base import FeatureClassifier, KeyValueCache, RowClassifier, class_sums
from vlprompt.caches.gda import GDA
from vlprompt.caches.linear_probe import LinearProbe
from vlprompt.caches.lp_plus_plus import LPPlusPlus
from vlprompt.caches.residual import TASKRES_RECIPE, TaskResidual
from vlprompt.caches.search import SearchResult, decades, grid
from vlprompt.caches.tfup import TFUP, cache_shots
from vlprompt.caches.tfup_trained import TFUP_T_RECIPE, Adaptation, TFUPTrained
from vlprompt.caches.tip_adapter import TIP_ADAPTER_F_RECIPE, TipAdapter, TipAdapterF
from vlprompt.caches.training import CacheRecipe, EpochRecipe, TrainingStep

__all__ = [
    "APE",
    "GDA",
    "TASKRES_RECIPE",
    "TFUP",
    "TFUP_T_RECIPE",
    "TIP_ADAPTER_F_RECIPE",
    "Adaptation",
    "CacheRecipe",
    "EpochRecipe",
    "FeatureClassifier",
    "KeyValueCache",
    "LPPlusPlus",
    "LinearProbe",
    "RowClassifier",
    "SearchResult",
    "TFUPTrained",
    "TaskResidual",
    "TipAdapter",
    "TipAdapterF",
    "TrainingStep",
    "cache_shots",
    "class_sums",
    "decades",
    "grid",
]
