"""Adaptation to single test images, independent of methods."""
