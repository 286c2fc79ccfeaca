"""Which missing expert the next layer will probably want, brought over while the link is idle.

Knows routers, plans and counters; transfers are the executor's. Neighbouring layers see similar
activations, so the next layer's router, given what this layer's router sees, mostly names experts
that the next layer's own input will choose. It is a guess: the true router decides, and a wrong
guess costs a transfer that nobody waits for. The planner itself streams what the link has time for,
so time is left over mainly where the device has most to do: in large prefills, and where nearly all
experts are resident.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.model.experts import Expert, LayerExperts
from moe_jax.model.int8 import Int8Expert
from moe_jax.model.router import route_to_pieces
from moe_jax.placement.curves import CostCurves

NOTHING = -1


def guess_missing(
    router: Float[Array, "routed embed"],
    address: Int[Array, " experts"],
    slots: Int[Array, ""],
    x: Float[Array, "tokens embed"],
    valid: Bool[Array, " tokens"],
    moe: MoEConfig,
) -> Int[Array, ""]:
    """The address of the missing expert to which a router would give most of the gates, if any.

    `router`, `address` and `slots` are the next layer's, `x` is what this layer's router sees.
    Returns NOTHING if it chooses resident experts only.
    """
    gates, chosen = route_to_pieces(router, x, moe)
    gates = jnp.where(valid[:, None], gates.astype(jnp.float32), 0)
    experts = address.shape[0]
    wanted = jnp.zeros(experts).at[address[chosen]].add(gates)
    wanted = jnp.where(jnp.arange(experts) >= slots, wanted, 0)
    best = jnp.argmax(wanted).astype(jnp.int32)
    return jnp.where(wanted[best] > 0, best, NOTHING)


def link_has_time(
    predicted: Float[Array, ""],
    streamed: Bool[Array, " experts"],
    missing: Bool[Array, " experts"],
    curves: CostCurves,
) -> Bool[Array, ""]:
    """Whether one expert more can come while a layer runs that takes `predicted` seconds.

    The link must have time beside the `streamed` experts it brings, and host memory beside all the
    `missing` ones that are read from it, streamed or on the host.
    """
    busy = jnp.where(streamed, curves.stream, 0).sum()
    link = curves.link_latency + busy + curves.stream
    memory = (missing.sum(dtype=jnp.float32) + 1) * curves.memory
    return jnp.isfinite(curves.stream) & (jnp.maximum(link, memory) <= predicted)


def pays(begun: int, useful: int) -> bool:
    """Whether to go on prefetching: of 64 or more, at least a quarter was used.

    A transfer that nobody waits for still reads host memory, which host experts need as well.
    """
    return begun < 64 or 4 * useful >= begun


@dataclass
class Prefetcher:
    """What was brought over for the next layer, and how often that was of use.

    Attributes:
      on: whether to prefetch at all.
      begun: transfers so far.
      useful: those whose expert the next layer gave tokens to.
    """

    on: bool = False
    begun: int = 0
    useful: int = 0
    _held: tuple[LayerExperts, int, Expert | Int8Expert] | None = None

    def keep(self, experts: LayerExperts, address: int, expert: Expert | Int8Expert) -> None:
        """Holds an expert until the next layer begins."""
        self.begun += 1
        self._held = experts, address, expert

    def take(self, experts: LayerExperts) -> tuple[int, Expert | Int8Expert | None]:
        """What is held for this layer, and its address; whatever it is, it is held no longer.

        An interrupted step may have left something for a layer that is not the next to run.
        """
        held, self._held = self._held, None
        if held is None or held[0] is not experts:
            return NOTHING, None
        return held[1], held[2]
