"""One file per method; importing the package enrols them all."""

from vlprompt.methods import coop, mocoop, zeroshot  # noqa: F401  (importing registers)
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import create_method, get_method_class, list_methods, register

__all__ = ["PromptMethod", "create_method", "get_method_class", "list_methods", "register"]
