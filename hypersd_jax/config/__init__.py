"""Typed configuration: YAML plus ``key.path=value`` overrides into frozen dataclasses.

Unknown keys and bad values are errors that name the key and the nearest valid name; every key is read by some code.
"""

from hypersd_jax.config.adversarial import AdversarialConfig as AdversarialConfig
from hypersd_jax.config.building import build as build
from hypersd_jax.config.consistency import ConsistencyStage as ConsistencyStage
from hypersd_jax.config.data import DataConfig as DataConfig
from hypersd_jax.config.distributed import DistributedConfig as DistributedConfig
from hypersd_jax.config.feedback import FeedbackConfig as FeedbackConfig
from hypersd_jax.config.feedback import GuardConfig as GuardConfig
from hypersd_jax.config.feedback import JudgeConfig as JudgeConfig
from hypersd_jax.config.feedback import RewardConfig as RewardConfig
from hypersd_jax.config.feedback_stage import FeedbackStage as FeedbackStage
from hypersd_jax.config.files import first_difference as first_difference
from hypersd_jax.config.files import load_config as load_config
from hypersd_jax.config.files import load_run as load_run
from hypersd_jax.config.files import save_config as save_config
from hypersd_jax.config.files import to_dict as to_dict
from hypersd_jax.config.generator import BASE as BASE
from hypersd_jax.config.generator import PREVIOUS as PREVIOUS
from hypersd_jax.config.generator import GeneratorStage as GeneratorStage
from hypersd_jax.config.generator import RegressionConfig as RegressionConfig
from hypersd_jax.config.generator import RegressionStage as RegressionStage
from hypersd_jax.config.generator import RegulariserConfig as RegulariserConfig
from hypersd_jax.config.generator import ScoreStage as ScoreStage
from hypersd_jax.config.hints import SYNONYMS as SYNONYMS
from hypersd_jax.config.hints import key_paths as key_paths
from hypersd_jax.config.hints import nearest as nearest
from hypersd_jax.config.kinds import kinds as kinds
from hypersd_jax.config.lora_stage import BesideConfig as BesideConfig
from hypersd_jax.config.lora_stage import LoraStage as LoraStage
from hypersd_jax.config.model_stages import AutoencoderStage as AutoencoderStage
from hypersd_jax.config.model_stages import TeacherStage as TeacherStage
from hypersd_jax.config.scalars import utf8 as utf8
from hypersd_jax.config.schema import EMBEDDED_GUIDANCE as EMBEDDED_GUIDANCE
from hypersd_jax.config.schema import Config as Config
from hypersd_jax.config.schema import EvaluationConfig as EvaluationConfig
from hypersd_jax.config.schema import LogConfig as LogConfig
from hypersd_jax.config.schema import LoraConfig as LoraConfig
from hypersd_jax.config.schema import MeshConfig as MeshConfig
from hypersd_jax.config.schema import ModelConfig as ModelConfig
from hypersd_jax.config.stage import Sampling as Sampling
from hypersd_jax.config.stage import StageConfig as StageConfig
from hypersd_jax.config.structure import StructureConfig as StructureConfig
