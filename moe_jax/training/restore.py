"""Reads a checkpoint of any family into the tree that the training forward takes.

Knows no file format: `moe_jax.checkpoint` reads the arrays one by one.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe_jax.checkpoint import open_checkpoint
from moe_jax.config import ModelConfig
from moe_jax.model.weights import ModelWeights


def restore(
    folder: pathlib.Path, dtype: DTypeLike = jnp.float32
) -> tuple[ModelWeights, ModelConfig]:
    """Returns the weights, with every layer's experts as one bank, and the model's config.

    Raises:
      ValueError: the folder is no checkpoint, or a damaged one.
    """
    checkpoint = open_checkpoint(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found: dict[str, jax.Array] = {}
    checkpoint.load(dtype, lambda name: here, found.__setitem__)
    config = checkpoint.config
    abstract = nnx.eval_shape(lambda: ModelWeights(config, jnp.dtype(dtype), with_experts=True))
    graph, state = nnx.split(abstract)
    leaves = {}
    for path, _ in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name in found:
            leaves[path] = found[name]
            continue
        # layers.L.experts.gate_up stacks layers.L.experts.0.gate_up and its sisters.
        layer, _, matrix = name.partition(".experts.")
        each = [f"{layer}.experts.{expert}.{matrix}" for expert in range(config.moe.num_experts)]
        leaves[path] = jnp.stack([found.pop(expert) for expert in each])
    filled = jax.tree.unflatten(
        jax.tree.structure(state), [leaves[path] for path, _ in nnx.to_flat_state(state)]
    )
    return nnx.merge(graph, filled), config


def restore_mean(folders: Sequence[pathlib.Path]) -> tuple[ModelWeights, ModelConfig]:
    """Returns the mean of what several trainings made of one model, float32, and its config.

    Often it is better than each (Wortsman et al. 2022, "Model soups", section 2).

    Raises:
      ValueError: as `restore`, or the folders hold models of different shapes.
    """
    weights, config = restore(folders[0])
    state = nnx.state(weights)
    for folder in folders[1:]:
        more, other = restore(folder)
        if other != config:
            raise ValueError(
                f"{folders[0]} and {folder} hold models of different shapes; only trainings of one "
                "model have a mean"
            )
        state = jax.tree.map(jnp.add, state, nnx.state(more))
    nnx.update(weights, jax.tree.map(lambda total: total / len(folders), state))
    return weights, config
