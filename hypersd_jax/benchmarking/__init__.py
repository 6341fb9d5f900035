"""Measurements of the package's own speed, which `hypersd benchmark` runs; importing this imports no JAX."""

APIS = ("pmap", "jit", "shard_map")
"""JAX's ways to run one function on several devices that `hypersd benchmark sampling` compares."""
