"""Image-caption pairs: files, shards and their features."""

from vlprompt._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
