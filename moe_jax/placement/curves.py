"""What one expert costs, by the number of tokens it is given, and what bringing it over costs.

Plain numbers of one machine and one expert shape; who measured them is not known here.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CostCurves:
    """Seconds, all float32; infinity means never.

    Attributes:
      tokens: the token counts of the knots, increasing, the first at least 1.
      host: one expert on that many tokens, on the host.
      device: the same on the device, weights already there.
      stream: bringing one expert's weights over the link.
      host_launch: starting the host computation at all.
      link_latency: starting the first transfer.
      memory: the host memory's time to read one expert, whoever reads it.
    """

    tokens: Float[Array, " knots"]
    host: Float[Array, " knots"]
    device: Float[Array, " knots"]
    stream: Float[Array, ""]
    host_launch: Float[Array, ""]
    link_latency: Float[Array, ""]
    memory: Float[Array, ""]


def seconds(
    knots: Float[Array, " knots"], curve: Float[Array, " knots"], tokens: Float[Array, "*counts"]
) -> Float[Array, "*counts"]:
    """The curve at these token counts: linear between knots, flat before the first.

    Past the last knot it goes on with the last slope. A curve of infinities stays infinite.
    """
    inside = jnp.interp(tokens, knots, curve)
    if knots.shape[0] == 1:
        return inside
    slope = (curve[-1] - curve[-2]) / (knots[-1] - knots[-2])
    # Infinity minus infinity has no slope.
    slope = jnp.where(jnp.isfinite(slope), slope, 0)
    beyond = inside + slope * jnp.maximum(tokens - knots[-1], 0)
    return jnp.where(jnp.isinf(curve[0]), jnp.inf, beyond)
