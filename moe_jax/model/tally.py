"""What the layers of one step report: which experts got tokens, and how they were run."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.placement.planner import LayerPlan, Mode


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tally:
    """The report of one step, filled layer by layer; rows of dense layers stay 0.

    One array for all that is reported: every array costs each layer's call some microseconds.

    Attributes:
      layer: the layer that reports next.
      rows: of each layer, one after another: the `Mode` in which each expert ran, the tokens routed
        to it, the sum of its gates over those tokens, and last the seconds that the planner
        expected the expert part to take, and those that no plan could have beaten.
    """

    layer: Int[Array, ""]
    rows: Float[Array | np.ndarray, "layers width"]

    @classmethod
    def empty(cls, layers: int, experts: int) -> "Tally":
        """Nothing done yet."""
        assert Mode.IDLE == 0, "rows of layers without experts are zeros"
        rows = jnp.zeros((layers, 3 * experts + 2), jnp.float32)
        return cls(layer=jnp.zeros((), jnp.int32), rows=rows)

    @property
    def modes(self) -> Int[Array | np.ndarray, "layers experts"]:
        """The `Mode` in which each expert ran."""
        return self._part(0).astype(np.int32)

    @property
    def counts(self) -> Int[Array | np.ndarray, "layers experts"]:
        """Tokens routed to each expert."""
        return self._part(1).astype(np.int32)

    @property
    def gates(self) -> Float[Array | np.ndarray, "layers experts"]:
        """The sum of each expert's gates over its tokens."""
        return self._part(2)

    @property
    def predicted(self) -> Float[Array | np.ndarray, ""]:
        """Seconds the planner expected the expert parts of all layers to take."""
        return self.rows[:, -2].sum()

    @property
    def lower_bound(self) -> Float[Array | np.ndarray, ""]:
        """Seconds that the expert parts would have taken with any plan, by the same costs."""
        return self.rows[:, -1].sum()

    def after_dense_layer(self) -> "Tally":
        """This tally and a layer without experts."""
        return Tally(layer=self.layer + 1, rows=self.rows)

    def after_experts(
        self, plan: LayerPlan, counts: Int[Array, " experts"], gates: Float[Array, " experts"]
    ) -> "Tally":
        """This tally and a layer that ran by this plan; modes, counts and gates are by expert."""
        seconds = jnp.stack([plan.predicted, plan.lower_bound])
        parts = (plan.mode, counts, gates, seconds)
        row = jnp.concatenate([part.astype(jnp.float32) for part in parts])
        rows = lax.dynamic_update_index_in_dim(self.rows, row, self.layer, 0)
        return Tally(layer=self.layer + 1, rows=rows)

    def _part(self, place: int):
        experts = self.rows.shape[1] // 3
        return self.rows[:, place * experts : (place + 1) * experts]
