"""The version of vlprompt."""

__version__ = "0.1.0"
