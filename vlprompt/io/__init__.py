"""Saving heads and loading them again: safetensors and JSON, nothing pickled."""

from vlprompt.io.head import Head, load_head

__all__ = ["Head", "load_head"]
