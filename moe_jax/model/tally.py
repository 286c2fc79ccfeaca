"""What the layers of one step report: which experts got tokens, and how they were run."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.placement.planner import LayerPlan, Mode


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tally:
    """The report of one step, filled layer by layer; rows of dense layers stay 0.

    Attributes:
      layer: the layer that reports next.
      modes: the `Mode` in which each expert ran.
      predicted: seconds the planner expected the expert parts to take.
      counts: tokens routed to each expert.
      gates: the sum of each expert's gates over those tokens.
    """

    layer: Int[Array, ""]
    modes: Int[Array, "layers experts"]
    predicted: Float[Array, ""]
    counts: Int[Array, "layers experts"]
    gates: Float[Array, "layers experts"]

    @classmethod
    def empty(cls, layers: int, experts: int) -> "Tally":
        """Nothing done yet."""
        return cls(
            layer=jnp.zeros((), jnp.int32),
            modes=jnp.full((layers, experts), Mode.IDLE.value, jnp.int32),
            predicted=jnp.zeros((), jnp.float32),
            counts=jnp.zeros((layers, experts), jnp.int32),
            gates=jnp.zeros((layers, experts), jnp.float32),
        )

    def after_dense_layer(self) -> "Tally":
        """This tally and a layer without experts."""
        return Tally(**(vars(self) | {"layer": self.layer + 1}))

    def after_experts(
        self, plan: LayerPlan, counts: Int[Array, " experts"], gates: Float[Array, " experts"]
    ) -> "Tally":
        """This tally and a layer that ran by this plan; modes, counts and gates are by expert."""
        return Tally(
            layer=self.layer + 1,
            modes=lax.dynamic_update_index_in_dim(self.modes, plan.mode, self.layer, 0),
            predicted=self.predicted + plan.predicted,
            counts=lax.dynamic_update_index_in_dim(self.counts, counts, self.layer, 0),
            gates=lax.dynamic_update_index_in_dim(self.gates, gates, self.layer, 0),
        )
