"""Frozen CLIP backbones: loading, text tower, image tower. Nothing here is trained or depends on a method.

Names are imported on first use, because importing open_clip takes seconds.
"""

from vlprompt._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
