"""Backends: one module per way to compute the table of sums. Nothing here imports from the rest of the package."""
