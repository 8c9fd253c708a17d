"""Benchmarks: what the package is compared with, on which volumes, and the command that makes the README's table."""
