"""Recipes times seeds: what `benchmarks/ablation.py` trains, samples and tabulates."""
