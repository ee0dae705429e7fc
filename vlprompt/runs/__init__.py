"""Runs: training, evaluation, run folders, result tables and predictions."""
