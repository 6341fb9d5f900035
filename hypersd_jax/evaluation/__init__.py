"""Comparing models: features, distances with their errors, picture grids and the report page."""

from hypersd_jax.evaluation.curves import read_metrics as read_metrics
from hypersd_jax.evaluation.grid import picture_grid as picture_grid
from hypersd_jax.evaluation.lite0 import features as features
from hypersd_jax.evaluation.metrics import Estimate as Estimate
from hypersd_jax.evaluation.metrics import feature_distance as feature_distance
from hypersd_jax.evaluation.metrics import frechet_distance as frechet_distance
from hypersd_jax.evaluation.metrics import image_distance as image_distance
from hypersd_jax.evaluation.metrics import kernel_distance as kernel_distance
from hypersd_jax.evaluation.metrics import mean_estimate as mean_estimate
from hypersd_jax.evaluation.metrics import paired_margin as paired_margin
from hypersd_jax.evaluation.report import Report as Report
from hypersd_jax.evaluation.report import write_report as write_report
