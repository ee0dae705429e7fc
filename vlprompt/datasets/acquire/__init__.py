"""Acquisition of data sets: downloads, archives, checks, and cards of the user."""
