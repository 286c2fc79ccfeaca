"""One optimisation step: loss, gradient, AdamW.

Knows no data and no clock: the learning rate is an argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from moe_jax.config import ModelConfig
from moe_jax.evaluate.compression import token_nats
from moe_jax.model.weights import ModelWeights
from moe_jax.training.forward import AttentionKernel, forward


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
      dropout: see `moe_jax.training.forward`.
      balance: the weight of the load-balancing loss, summed over layers.
      weight_decay: per step and unit of learning rate, on matrices only.
      max_gradient: gradients are scaled down to this norm.
      kernel: the attention's implementation.
    """

    dropout: float
    balance: float
    weight_decay: float
    max_gradient: float = 1.0
    kernel: AttentionKernel = "plain"


class State(NamedTuple):
    """Float32 parameters and the optimiser's moments."""

    weights: PyTree[Array]
    optimiser: PyTree[Array]
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """What a step measured: nats per token, and the experts' shares of all choices."""

    nats: Float[Array, ""]
    balance: Float[Array, ""]
    shares: Float[Array, "layers experts"]


def initial_weights(config: ModelConfig, seed: int) -> ModelWeights:
    """Random weights; what writes into the residual stream is smaller the more layers there are."""
    weights = ModelWeights(config, jnp.float32, nnx.Rngs(seed), with_experts=True)
    scale = (2 * config.layers) ** -0.5
    for layer in weights.layers:
        outputs = [layer.attention.output]
        if layer.router is None:
            outputs.append(layer.ffn.down)
        else:
            outputs.append(layer.experts.down)
            # Near-uniform routing at first: the balance loss has not had its say yet.
            layer.router[...] = layer.router[...] * 0.1
        for output in outputs:
            output[...] = output[...] * scale
    return weights


def make_step(
    config: ModelConfig, training: TrainingConfig, weights: ModelWeights
) -> tuple[State, Callable[..., tuple[State, Metrics]], Callable[[State], ModelWeights]]:
    """Returns the first state, the jitted step, and a function from state back to weights.

    The step takes (state, rows [seqs, positions + 1], learning rate, key) and donates the state.
    Products are bfloat16, parameters and moments float32.
    """
    graph, parameters = nnx.split(weights)
    optimiser = optax.chain(
        optax.clip_by_global_norm(training.max_gradient),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(
            training.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
        ),
    )

    def loss(
        parameters: PyTree[Array], rows: Int[Array, "seqs length"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        outputs = forward(
            nnx.merge(graph, parameters),
            config,
            rows[:, :-1],
            dtype=jnp.bfloat16,
            dropout=training.dropout,
            key=key,
            kernel=training.kernel,
        )
        nats = token_nats(outputs.logits, rows[:, 1:]).mean()
        balance = outputs.balance.sum()
        total = nats + training.balance * balance
        return total, Metrics(nats, balance / config.layers, outputs.shares)

    @jax.jit(donate_argnums=0)
    def step(
        state: State,
        rows: Int[Array, "seqs length"],
        learning_rate: Float[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.weights, rows, key)
        # optax relies on promotion, which our tests forbid.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, moments = optimiser.update(gradient, state.optimiser, state.weights)
        moved = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)
        return State(moved, moments, state.step + 1), metrics

    first = State(parameters, optimiser.init(parameters), jnp.int32(0))
    return first, step, lambda state: nnx.merge(graph, state.weights)


def learning_rate(progress: float, peak: float, warm_up: float = 0.02) -> float:
    """Rises linearly, then falls linearly to 0; progress runs from 0 to 1.

    A long linear decay to zero suits many passes over little text (arXiv:2502.15938).
    """
    if progress < warm_up:
        return peak * max(progress, 1e-3) / warm_up
    return peak * max(0.0, 1 - progress) / (1 - warm_up)
