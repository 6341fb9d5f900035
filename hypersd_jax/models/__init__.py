"""Flax NNX ports of the networks: each is described by its own config.json and run as a function of its parameters."""

from __future__ import annotations

from hypersd_jax.models.clip_text import ClipTextConfig as ClipTextConfig
from hypersd_jax.models.clip_text import TextOutput as TextOutput
from hypersd_jax.models.clip_text import clip_text as clip_text
from hypersd_jax.models.functional import Network as Network
from hypersd_jax.models.functional import Params as Params
from hypersd_jax.models.functional import Shapes as Shapes
from hypersd_jax.models.functional import build as build
from hypersd_jax.models.unet import unet as unet
from hypersd_jax.models.unet_config import UNetConfig as UNetConfig
from hypersd_jax.models.vae import vae as vae
from hypersd_jax.models.vae_config import VaeConfig as VaeConfig
