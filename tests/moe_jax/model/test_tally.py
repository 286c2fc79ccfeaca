"""What the layers of a step report stands in their rows."""

import jax.numpy as jnp

from moe_jax.model.tally import Tally
from moe_jax.placement.planner import LayerPlan, Mode

EXPERTS = 5


def test_every_layer_has_its_row():
    counts, gates = jnp.array([3, 0, 1, 0, 0]), jnp.array([1.5, 0, 0.5, 0, 0])
    mode = jnp.array([Mode.HOST, 0, Mode.RESIDENT, 0, 0], jnp.int32)
    plan = LayerPlan(
        mode=mode, streams=jnp.int32(0), predicted=jnp.float32(7), lower_bound=jnp.float32(1)
    )
    tally = Tally.empty(3, EXPERTS).after_experts(plan, counts, gates)
    tally = tally.after_dense_layer().after_experts(plan, counts, gates)
    assert (tally.layer, tally.predicted, tally.lower_bound) == (3, 14, 2)
    assert tally.modes.tolist() == [mode.tolist(), [0] * 5, mode.tolist()]
    assert tally.counts.tolist() == [[3, 0, 1, 0, 0], [0] * 5, [3, 0, 1, 0, 0]]
    assert tally.gates[2].tolist() == [1.5, 0, 0.5, 0, 0] and not tally.gates[1].any()
