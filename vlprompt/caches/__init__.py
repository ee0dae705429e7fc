"""Caches and linear classifiers on frozen features: fit, predict, score, search.

One module per cache. They take features and labels, tensors in and tensors out, and know no images, prompts or data
sets.
"""
