"""One optimisation step: loss, gradient, Muon for matrices and Adam for the rest.

Knows no data and no clock: the learning rate is an argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moe_jax.config import ModelConfig
from moe_jax.model.weights import ModelWeights
from moe_jax.training.forward import hidden_states, output_table
from moe_jax.training.losses import mean_nats
from moe_jax.training.muon import muon_update


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
      balance: the weight of the load-balancing loss, summed over layers.
      weight_decay: per step and unit of learning rate, on the matrices Muon moves.
      adam_rate: Adam's learning rate (embedding, router, norms) in units of Muon's.
      capacity: room in each expert, see `moe_jax.training.mixture`.
      momentum: Muon's.
    """

    balance: float
    weight_decay: float
    adam_rate: float = 0.15
    capacity: float | None = 1.25
    momentum: float = 0.95


class State(NamedTuple):
    """Float32 parameters and the optimiser's moments."""

    weights: PyTree[Array]
    optimiser: PyTree[Array]
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """What a step measured: nats of every target, and the experts' shares of all choices."""

    nats: Float[Array, "seqs positions"]
    balance: Float[Array, ""]
    shares: Float[Array, "layers experts"]


def initial_weights(config: ModelConfig, seed: int) -> ModelWeights:
    """Random weights; what writes into the residual stream is smaller the more layers there are."""
    weights = ModelWeights(config, jnp.dtype(jnp.float32), nnx.Rngs(seed), with_experts=True)
    scale = (2 * config.layers) ** -0.5
    for layer in weights.layers:
        assert layer.router is not None and layer.experts is not None, "a layer without experts"
        for output in (layer.attention.output, layer.experts.down):
            output[...] = output[...] * scale
        # Near-uniform routing at first: the balance loss has not had its say yet.
        layer.router[...] = layer.router[...] * 0.1
    return weights


def stacked_rows(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Rows of the matrices a parameter of this name is made of; None: it is left to Adam."""
    a = config.attention
    if "qkv" in name:
        return (a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim)
    if "gate_up" in name:
        return (config.moe.ffn, config.moe.ffn)
    if "down" in name or "output" in name:
        return (config.embed,)
    return None


def make_optimiser(
    config: ModelConfig, training: TrainingConfig
) -> optax.GradientTransformationExtraArgs:
    """Directions of one unit of learning rate; to be subtracted after scaling by the rate."""

    def orthogonal(updates: PyTree[Array], _: PyTree[Array] | None) -> PyTree[Array]:
        return jax.tree.map_with_path(
            lambda path, leaf: muon_update(
                leaf, stacked_rows(config, jax.tree_util.keystr(path)) or ()
            ),
            updates,
        )

    def labels(parameters: PyTree[Array]) -> PyTree[str]:
        return jax.tree.map_with_path(
            lambda path, _: "muon" if stacked_rows(config, jax.tree_util.keystr(path)) else "adam",
            parameters,
        )

    muon = optax.chain(
        optax.trace(training.momentum, nesterov=True),
        optax.stateless(orthogonal),
        optax.add_decayed_weights(training.weight_decay),
    )
    adam = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-10), optax.scale(training.adam_rate)
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def make_step(
    config: ModelConfig, training: TrainingConfig, weights: ModelWeights
) -> tuple[State, Callable[..., tuple[State, Metrics]], Callable[[State], ModelWeights]]:
    """Returns the first state, the jitted step, and a function from state back to weights.

    The step takes (state, rows [seqs, positions + 1], the importance of each row's last positions,
    learning rate) and donates the state.
    Products are bfloat16, parameters and moments float32.
    """
    graph, parameters = nnx.split(weights)
    optimiser = make_optimiser(config, training)

    def loss(
        parameters: PyTree[Array],
        rows: Int[Array, "seqs length"],
        importance: Float[Array, "seqs positions"],
    ) -> tuple[Float[Array, ""], Metrics]:
        weights = nnx.merge(graph, parameters)
        hidden = hidden_states(
            weights, config, rows[:, :-1], dtype=jnp.bfloat16, capacity=training.capacity
        )
        mean, nats = mean_nats(
            hidden.states, output_table(weights), rows[:, 1:].reshape(-1), importance.reshape(-1)
        )
        balance = hidden.balance.sum()
        total = mean + training.balance * balance
        nats = nats.reshape(importance.shape)
        return total, Metrics(nats, balance / config.layers, hidden.shares)

    @jax.jit(donate_argnums=0)
    def step(
        state: State,
        rows: Int[Array, "seqs length"],
        importance: Float[Array, "seqs positions"],
        learning_rate: Float[Array, ""],
    ) -> tuple[State, Metrics]:
        gradient, metrics = jax.grad(loss, has_aux=True)(state.weights, rows, importance)
        # optax relies on promotion, which our tests forbid.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, moments = optimiser.update(gradient, state.optimiser, state.weights)
        moved = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)
        return State(moved, moments, state.step + 1), metrics

    first = State(parameters, optimiser.init(parameters), jnp.int32(0))
    return first, step, lambda state: nnx.merge(graph, state.weights)


def learning_rate(
    progress: float, peak: float, warm_up: float = 0.02, decay: float = 0.45
) -> float:
    """Rises linearly, stays, and falls linearly to 0; progress runs from 0 to 1."""
    rising = max(progress, 1e-3) / warm_up
    falling = (1 - progress) / decay
    return peak * max(0.0, min(1.0, rising, falling))
