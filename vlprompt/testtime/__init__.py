"""Adaptation to single test images."""
