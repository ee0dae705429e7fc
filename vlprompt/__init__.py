"""vlprompt: adapts frozen CLIP models to your own classes with a few labelled images, or none."""

from vlprompt._lazy import PROVIDERS, lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)

# A method that learns from a saved head cannot import what loads heads, because that imports the methods.
PROVIDERS["heads"] = "vlprompt.io.teachers"
