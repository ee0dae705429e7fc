"""Saving and loading heads as safetensors and JSON, without pickle."""

from vlprompt.io.head import Head, load_head

__all__ = ["Head", "load_head"]
