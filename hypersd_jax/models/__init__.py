"""Flax NNX ports of the networks: each is described by its own config.json and run as a function of its parameters."""

from __future__ import annotations

from hypersd_jax.models.clip_text import ClipTextConfig as ClipTextConfig
from hypersd_jax.models.clip_text import TextOutput as TextOutput
from hypersd_jax.models.clip_text import clip_text as clip_text
from hypersd_jax.models.controlnet import Residuals as Residuals
from hypersd_jax.models.controlnet import control_residuals as control_residuals
from hypersd_jax.models.controlnet import controlnet as controlnet
from hypersd_jax.models.controlnet import residual_scales as residual_scales
from hypersd_jax.models.controlnet import sum_residuals as sum_residuals
from hypersd_jax.models.controlnet_config import ControlNetConfig as ControlNetConfig
from hypersd_jax.models.functional import Network as Network
from hypersd_jax.models.functional import Params as Params
from hypersd_jax.models.functional import Shapes as Shapes
from hypersd_jax.models.functional import build as build
from hypersd_jax.models.heads import all_taps as all_taps
from hypersd_jax.models.heads import encoder_taps as encoder_taps
from hypersd_jax.models.heads import patch_heads as patch_heads
from hypersd_jax.models.heads import pooled_heads as pooled_heads
from hypersd_jax.models.heads import tap_channels as tap_channels
from hypersd_jax.models.tiling import decode_tiled as decode_tiled
from hypersd_jax.models.tiling import encode_tiled as encode_tiled
from hypersd_jax.models.unet import unet as unet
from hypersd_jax.models.unet_config import UNetConfig as UNetConfig
from hypersd_jax.models.vae import vae as vae
from hypersd_jax.models.vae_config import VaeConfig as VaeConfig
from hypersd_jax.models.vae_tiny import tiny_vae as tiny_vae
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig as TinyVaeConfig
