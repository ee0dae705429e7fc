"""Data set cards, readers and few-shot draws; no tensors.

Names are imported on first use, which keeps ``import vlprompt.datasets`` fast.
"""

from vlprompt._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
