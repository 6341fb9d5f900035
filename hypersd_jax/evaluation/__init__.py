"""Comparing models: features, distances with their errors, picture grids and the report page."""

from hypersd_jax.evaluation.curves import read_metrics as read_metrics
from hypersd_jax.evaluation.grid import picture_grid as picture_grid
from hypersd_jax.evaluation.lite0 import features as features
from hypersd_jax.evaluation.metrics import Estimate as Estimate
from hypersd_jax.evaluation.metrics import diversity as diversity
from hypersd_jax.evaluation.metrics import feature_distance as feature_distance
from hypersd_jax.evaluation.metrics import frechet_distance as frechet_distance
from hypersd_jax.evaluation.metrics import image_distance as image_distance
from hypersd_jax.evaluation.metrics import kernel_distance as kernel_distance
from hypersd_jax.evaluation.metrics import mean_estimate as mean_estimate
from hypersd_jax.evaluation.metrics import paired_margin as paired_margin
from hypersd_jax.evaluation.report import Report as Report
from hypersd_jax.evaluation.report import write_report as write_report
from hypersd_jax.evaluation.scorer import SPECS as SPECS
from hypersd_jax.evaluation.scorer import Scorer as Scorer
from hypersd_jax.evaluation.scorer import load_card as load_card
from hypersd_jax.evaluation.scorer import load_scorer as load_scorer
from hypersd_jax.evaluation.scorer import seen_by as seen_by
from hypersd_jax.evaluation.tables import write_markdown as write_markdown
from hypersd_jax.evaluation.text_match import TextMatch as TextMatch
from hypersd_jax.evaluation.text_match import derangement as derangement
from hypersd_jax.evaluation.text_match import knows as knows
from hypersd_jax.evaluation.text_match import text_match as text_match
