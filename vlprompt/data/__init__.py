"""Data as tensors: transforms, batches, the feature store and the LightningDataModule."""

from vlprompt._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
