"""Mutated files for `benchmarks/fuzz_loaders.py`: what is sound, what is done to it, and what counts as wrong."""
