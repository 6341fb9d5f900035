"""Recipes times seeds: what `benchmarks/ablation.py` trains, draws and tabulates."""
