"""LoRA as pure functions on trees: start, attach, combine, pad, merge and take apart."""

from __future__ import annotations

from hypersd_jax.adapters.apply import apply_conv as apply_conv
from hypersd_jax.adapters.apply import apply_linear as apply_linear
from hypersd_jax.adapters.apply import attach as attach
from hypersd_jax.adapters.apply import project_up as project_up
from hypersd_jax.adapters.convolution import convolution as convolution
from hypersd_jax.adapters.differences import Differences as Differences
from hypersd_jax.adapters.differences import altered as altered
from hypersd_jax.adapters.differences import difference_delta as difference_delta
from hypersd_jax.adapters.fusing import delta as delta
from hypersd_jax.adapters.fusing import merge as merge
from hypersd_jax.adapters.lora import BUCKETS as BUCKETS
from hypersd_jax.adapters.lora import TARGETS_14 as TARGETS_14
from hypersd_jax.adapters.lora import Adapter as Adapter
from hypersd_jax.adapters.lora import bucket as bucket
from hypersd_jax.adapters.lora import concatenate as concatenate
from hypersd_jax.adapters.lora import init as init
from hypersd_jax.adapters.lora import join as join
from hypersd_jax.adapters.lora import pad as pad
from hypersd_jax.adapters.lora import scaled as scaled
from hypersd_jax.adapters.lora import split as split
from hypersd_jax.adapters.lora import target_paths as target_paths
from hypersd_jax.adapters.low_rank import Truncated as Truncated
from hypersd_jax.adapters.low_rank import low_rank as low_rank
from hypersd_jax.adapters.low_rank import reduced as reduced
