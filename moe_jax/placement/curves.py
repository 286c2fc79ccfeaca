"""What one expert costs on the host, on the device and on the link between them.

Knows numbers only: who measured them, and on what, is recorded elsewhere.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@no_type_check  # jax rebuilds it with shapes, shardings and batched leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CostCurves:
    """The costs of one kind of expert, all experts of it having equal bytes; float32 seconds.

    Attributes:
      tokens: token counts at which the curves were taken; increasing, the first at least 1.
      host: one expert on that many tokens, computed on the host by all its threads. Should not
        decrease; infinite: never use the host.
      device: the same on the device, its weights being there. Finite.
      stream: bringing one expert's weights over the link. Infinite: never stream.
      host_launch: starting the host computation, once per layer if any expert runs there.
      link_latency: starting the first transfer of a layer.
      memory: reading one expert from host memory at the full rate, whoever reads it.
      host_beside: 1 if host and device work at the same time, 0 if one after the other.
      link_beside: the same for the link and the device.
    """

    tokens: Float[Array, " knots"]
    host: Float[Array, " knots"]
    device: Float[Array, " knots"]
    stream: Float[Array, ""]
    host_launch: Float[Array, ""]
    link_latency: Float[Array, ""]
    memory: Float[Array, ""]
    host_beside: Float[Array, ""] = field(default_factory=lambda: jnp.float32(1))
    link_beside: Float[Array, ""] = field(default_factory=lambda: jnp.float32(1))

    def host_seconds(self, n: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Seconds for one expert on n tokens on the host."""
        return seconds(self.tokens, self.host, n)

    def device_seconds(self, n: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Seconds for one expert on n tokens on the device, its weights being there."""
        return seconds(self.tokens, self.device, n)


def seconds(
    tokens: Float[Array, " knots"], curve: Float[Array, " knots"], n: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Reads a curve at n tokens: linear between knots, constant before the first one.

    Past the last knot the last slope goes on. Knots may be infinite; past a finite knot that is
    followed by an infinite one, the curve is infinite.
    """
    n = jnp.maximum(n.astype(jnp.float32), tokens[0])
    slope = jnp.diff(curve) / jnp.diff(tokens)
    slope = jnp.where(jnp.isnan(slope), 0, slope)  # between two infinite knots
    slope = jnp.concatenate([slope, slope[-1:] if slope.size else jnp.zeros(1)])
    knot = jnp.sum(n[..., None] >= tokens[1:].reshape((1,) * n.ndim + (-1,)), axis=-1)
    past = n - tokens[knot]
    return curve[knot] + jnp.where(past > 0, slope[knot] * past, 0)
