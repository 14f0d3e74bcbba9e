"""Benchmarks: one file per part with a function `rows()`; `python -m bench` runs them, compares and reports."""
