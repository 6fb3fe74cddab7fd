"""Ablations: the paper's questions answered on the built-in system, and what exists only to be compared."""
