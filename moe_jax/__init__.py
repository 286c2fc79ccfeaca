"""Runs Mixture-of-Experts language models that are bigger than the accelerator's memory."""

from moe_jax.config import AttentionConfig as AttentionConfig
from moe_jax.config import ModelConfig as ModelConfig
from moe_jax.config import MoEConfig as MoEConfig
from moe_jax.config import RopeConfig as RopeConfig
from moe_jax.decoding.sampling_params import SamplingParams as SamplingParams
from moe_jax.engine.engine import Engine as Engine
from moe_jax.engine.handle import Handle as Handle
from moe_jax.engine.load import load as load
from moe_jax.engine.loop import Load as Load
from moe_jax.engine.outputs import Completion as Completion
from moe_jax.engine.outputs import Piece as Piece
from moe_jax.engine.outputs import Timing as Timing
from moe_jax.engine.stats import Stats as Stats
