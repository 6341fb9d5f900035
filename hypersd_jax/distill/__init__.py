"""Distillation losses; they receive model functions as arguments and know no model."""

from __future__ import annotations

from hypersd_jax.distill.adversarial import ADVERSARIAL_LOSSES as ADVERSARIAL_LOSSES
from hypersd_jax.distill.adversarial import accuracy as accuracy
from hypersd_jax.distill.adversarial import discriminator_loss as discriminator_loss
from hypersd_jax.distill.adversarial import finite_difference_r1 as finite_difference_r1
from hypersd_jax.distill.adversarial import generator_loss as generator_loss
from hypersd_jax.distill.adversarial import renoise as renoise
from hypersd_jax.distill.consistency import METHODS as METHODS
from hypersd_jax.distill.consistency import consistency_loss as consistency_loss
from hypersd_jax.distill.denoising import Corruption as Corruption
from hypersd_jax.distill.denoising import corruption as corruption
from hypersd_jax.distill.denoising import denoising_loss as denoising_loss
from hypersd_jax.distill.distances import Distance as Distance
from hypersd_jax.distill.distances import mse as mse
from hypersd_jax.distill.distances import pseudo_huber as pseudo_huber
from hypersd_jax.distill.lcm import boundary_scalings as boundary_scalings
from hypersd_jax.distill.lcm import lcm_pair as lcm_pair
from hypersd_jax.distill.matching import fake_loss as fake_loss
from hypersd_jax.distill.matching import matching_loss as matching_loss
from hypersd_jax.distill.matching import score_term as score_term
from hypersd_jax.distill.reconstruction import psnr as psnr
from hypersd_jax.distill.reconstruction import reconstruction_loss as reconstruction_loss
from hypersd_jax.distill.regression import endpoint as endpoint
from hypersd_jax.distill.regression import path_loss as path_loss
from hypersd_jax.distill.regression import second_estimate as second_estimate
from hypersd_jax.distill.score import dmd_gradient as dmd_gradient
from hypersd_jax.distill.score import surrogate_loss as surrogate_loss
from hypersd_jax.distill.segments import Segments as Segments
from hypersd_jax.distill.segments import pad_segments as pad_segments
from hypersd_jax.distill.segments import segment_bounds as segment_bounds
from hypersd_jax.distill.target_timesteps import segment_boundary as segment_boundary
from hypersd_jax.distill.target_timesteps import uniform_integer as uniform_integer
from hypersd_jax.distill.target_timesteps import uniform_target as uniform_target
from hypersd_jax.distill.trajectory import Drawn as Drawn
from hypersd_jax.distill.trajectory import Sample as Sample
from hypersd_jax.distill.trajectory import draw_trajectory as draw_trajectory
from hypersd_jax.distill.trajectory import noised as noised
from hypersd_jax.distill.trajectory import student_sample as student_sample
from hypersd_jax.distill.tscd import Draw as Draw
from hypersd_jax.distill.tscd import Model as Model
from hypersd_jax.distill.tscd import Pair as Pair
from hypersd_jax.distill.tscd import Teacher as Teacher
from hypersd_jax.distill.tscd import alpha_sigma as alpha_sigma
from hypersd_jax.distill.tscd import draw as draw
from hypersd_jax.distill.tscd import tscd_pair as tscd_pair
