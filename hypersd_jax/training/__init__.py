"""The engine: mesh, sharding rules, state, step, checkpoints, logging.

It knows nothing of diffusion: it trains a tree of arrays on a loss that is given to it.
"""

from __future__ import annotations

from hypersd_jax.training.agreement import LAG as LAG
from hypersd_jax.training.agreement import Agreement as Agreement
from hypersd_jax.training.checkpoints import Checkpointer as Checkpointer
from hypersd_jax.training.checkpoints import check_metadata as check_metadata
from hypersd_jax.training.checkpoints import newest_step as newest_step
from hypersd_jax.training.gradients import Metrics as Metrics
from hypersd_jax.training.guard import Measured as Measured
from hypersd_jax.training.guard import Watch as Watch
from hypersd_jax.training.logging import MetricsLog as MetricsLog
from hypersd_jax.training.mesh import process_indices as process_indices
from hypersd_jax.training.mesh import put_batch as put_batch
from hypersd_jax.training.mesh import replicated as replicated
from hypersd_jax.training.optimizer import learning_rate_at as learning_rate_at
from hypersd_jax.training.optimizer import make_optimizer as make_optimizer
from hypersd_jax.training.settings import Settings as Settings
from hypersd_jax.training.settings import step_argument as step_argument
from hypersd_jax.training.shardings import abstract as abstract
from hypersd_jax.training.shardings import tree_shardings as tree_shardings
from hypersd_jax.training.skips import SkipWatch as SkipWatch
from hypersd_jax.training.state import TrainState as TrainState
from hypersd_jax.training.state import init_state as init_state
from hypersd_jax.training.step import LossFunction as LossFunction
from hypersd_jax.training.step import Phase as Phase
from hypersd_jax.training.step import Step as Step
from hypersd_jax.training.step import make_step as make_step
from hypersd_jax.training.stopping import StopSignals as StopSignals
from hypersd_jax.weights.mesh import make_mesh as make_mesh
from hypersd_jax.weights.placement import batch_sharding as batch_sharding
from hypersd_jax.weights.placement import leaf_sharding as leaf_sharding
