"""Runs that `benchmarks/kill_test.py` kills: of one process, and of several that train together."""
