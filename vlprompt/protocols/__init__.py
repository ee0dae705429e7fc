"""Protocols: grids of runs, and the tables that compare them."""
