"""How a model uses its experts: evenly over a text, and how decidedly for each token.

Even use alone says little: a router that knows nothing is even too. Experts have specialised where
tokens that are sure of their experts are sure of different ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class RoutingSums(NamedTuple):
    """What adds up over parts of a text.

    Attributes:
      tokens: how many were counted.
      chosen: how often a token chose each expert.
      probability: the router's probability of each expert.
      entropy: of every token's probabilities, in bits.
    """

    tokens: Float[Array, ""]
    chosen: Float[Array, "layers experts"]
    probability: Float[Array, "layers experts"]
    entropy: Float[Array, " layers"]


class LayerRouting(NamedTuple):
    """One layer's routing over a text.

    Attributes:
      least, most: the choices of the least and the most used expert, over the fair share.
      use_bits: entropy of the router's mean probabilities; at most log2 of the experts.
      token_bits: mean entropy of the probabilities of one token; at most use_bits.
      told_bits: the difference: what the choice of an expert tells about the token, 0 where all
        tokens are routed alike.
    """

    least: float
    most: float
    use_bits: float
    token_bits: float
    told_bits: float

    def __str__(self) -> str:
        return (
            f"use over fair share {self.least:.2f} to {self.most:.2f}, entropy of use "
            f"{self.use_bits:.2f} bits, of a token's router {self.token_bits:.2f} bits"
        )


def sum_routing(
    probabilities: Float[Array, "layers seqs positions experts"],
    counted: Bool[Array, "seqs positions"],
    experts_per_token: int,
) -> RoutingSums:
    """Sums over the tokens that are counted; jittable."""
    p = jnp.where(counted[None, :, :, None], probabilities.astype(jnp.float32), 0.0)
    _, best = jax.lax.top_k(p, experts_per_token)
    chosen = jax.nn.one_hot(best, p.shape[-1], dtype=jnp.float32)
    chosen = jnp.where(counted[None, :, :, None, None], chosen, 0.0)
    return RoutingSums(
        tokens=counted.sum().astype(jnp.float32),
        chosen=chosen.sum(axis=(1, 2, 3)),
        probability=p.sum(axis=(1, 2)),
        entropy=jax.scipy.special.entr(p).sum(axis=(1, 2, 3)) / jnp.log(2.0),
    )


def describe_routing(sums: list[RoutingSums]) -> list[LayerRouting]:
    """The routing of every layer over all parts. Raises ValueError if no token was counted."""
    tokens, chosen, probability, entropy = (
        np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
        for parts in zip(*sums, strict=True)
    )
    if not tokens:
        raise ValueError("no token was counted; give a text with at least one")
    layers = []
    for choices, summed, bits in zip(chosen, probability, entropy, strict=True):
        share = choices * choices.size / choices.sum()
        mean = summed / summed.sum()
        use = -float(np.sum(mean * np.log2(mean, where=mean > 0, out=np.zeros_like(mean))))
        token = float(bits / tokens)
        layers.append(LayerRouting(float(share.min()), float(share.max()), use, token, use - token))
    return layers
