"""Protocols: one run, base-to-new over seeds, evaluation of saved heads, predictions."""
