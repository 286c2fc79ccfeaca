"""Which experts a token goes to, and with what weight."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig


def route(
    kernel: Float[Array, "experts embed"], x: Float[Array, "tokens embed"], moe: MoEConfig
) -> tuple[
    Float[Array, "tokens choices"], Int[Array, "tokens choices"], Float[Array, "tokens experts"]
]:
    """Chooses the most probable experts of every token, before any is cut.

    Returns the gates (float32), the expert ids (int32) and the probabilities of all experts
    (float32). The scores are kept in float32, where Transformers rounds them to the model's dtype.
    """
    scores = lax.dot_general(
        x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    probabilities = jax.nn.softmax(scores, axis=-1)
    gates, experts = lax.top_k(probabilities, moe.routed_per_token)
    if moe.normalise_gates:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return gates, experts, probabilities


def route_to_pieces(
    kernel: Float[Array, "routed embed"], x: Float[Array, "tokens embed"], moe: MoEConfig
) -> tuple[Float[Array, "tokens choices"], Int[Array, "tokens choices"]]:
    """`route`'s gates and ids where experts may be cut: of each chosen one, all its pieces.

    Pieces of expert e are e * pieces and the following; each has its expert's gate.
    """
    gates, experts, _ = route(kernel, x, moe)
    piece = jnp.arange(moe.pieces, dtype=jnp.int32)
    ids = experts[:, :, None] * moe.pieces + piece[None, None]
    return jnp.repeat(gates, moe.pieces, axis=1), ids.reshape(x.shape[0], -1)
