"""All methods, one module each; importing the package imports every module in it, which registers the methods."""

import importlib
import pkgutil

from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import create_method, get_method_class, list_methods, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PromptMethod", "create_method", "get_method_class", "list_methods", "register"]
