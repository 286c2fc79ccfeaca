"""How much the experts of a step give each resource to do, by the cost curves.

Numbers on the host, since it is asked after every step; nothing here is measured.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode
from moe_jax.placement.timeline import LANES


@dataclass(frozen=True, kw_only=True)
class WorkCosts:
    """Cost curves up to some count of tokens, which indexes `host` and `device`; seconds."""

    host: Float[np.ndarray, " tokens"]
    device: Float[np.ndarray, " tokens"]
    stream: float
    host_launch: float
    link_latency: float
    memory: float


def work_costs(curves: CostCurves, tokens: int) -> WorkCosts:
    """Reads the curves once, for experts with at most this many tokens."""
    host, device = _read_up_to(curves, tokens)
    return WorkCosts(
        host=np.asarray(host, np.float64),
        device=np.asarray(device, np.float64),
        stream=float(curves.stream),
        host_launch=float(curves.host_launch),
        link_latency=float(curves.link_latency),
        memory=float(curves.memory),
    )


@partial(jax.jit, static_argnames="tokens")
def _read_up_to(
    curves: CostCurves, tokens: int
) -> tuple[Float[Array, " counts"], Float[Array, " counts"]]:
    counts = jnp.arange(tokens + 1, dtype=jnp.int32)
    return curves.host_seconds(counts), curves.device_seconds(counts)


def busy_seconds(
    modes: Int[np.ndarray, "layers experts"],
    counts: Int[np.ndarray, "layers experts"],
    costs: WorkCosts,
) -> dict[str, float]:
    """How long the experts keep each of `LANES` busy, over all layers.

    The same terms as `rules.resource_seconds`, without who waits for whom. Infinite where an
    expert runs in a way that the curves forbid.
    """
    ways, tokens = modes.ravel(), counts.ravel()
    _, _, streams, hosts = np.bincount(ways, minlength=len(Mode)).tolist()
    by_way = np.bincount(ways, costs.device[tokens], minlength=len(Mode)).tolist()
    device = by_way[Mode.RESIDENT] + by_way[Mode.STREAM]
    link, host = 0.0, 0.0
    if streams:
        layers = int((modes == Mode.STREAM).any(axis=1).sum())
        link = layers * costs.link_latency + streams * costs.stream
    if hosts:
        layers = int((modes == Mode.HOST).any(axis=1).sum())
        host = layers * costs.host_launch + float(costs.host[counts[modes == Mode.HOST]].sum())
    return dict(zip(LANES, (device, link, host, (streams + hosts) * costs.memory), strict=True))
