"""Stages: the only room that ties losses to models and data."""

from hypersd_jax.stages.run import train as train
