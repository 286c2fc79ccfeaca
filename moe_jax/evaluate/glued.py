"""Answers questions over chunks that were read on their own and then put side by side.

What gluing stored keys and values of chunks together gives: no token of a chunk has seen another
chunk, only the question sees all. Positions are those in the whole prompt, as after turning the
rotary angles of a stored chunk. This is a plain forward pass with a mask, not a cache.
"""

from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax.config import ModelConfig
from moe_jax.engine.progress import progress_bar
from moe_jax.evaluate.data import Question
from moe_jax.evaluate.questions import Answers, QuestionSet, grade
from moe_jax.model.weights import ModelWeights
from moe_jax.training.forward import forward

# Prompts are filled up to a multiple of this, so that few programs are compiled.
_BUCKET = 128


def answer_glued(
    weights: ModelWeights,
    config: ModelConfig,
    questions: QuestionSet,
    *,
    glued: bool = True,
    progress: bool = False,
) -> Answers:
    """Which answers the model gives greedily, in float32, where no chunk has seen another.

    Args:
      weights: of `moe_jax.training.restore.restore`.
      glued: False: every token sees all before it, as ever.

    Raises:
      ValueError: the model is of a kind that `moe_jax.training.forward` does not compute.
    """
    likeliest = nnx.jit(partial(_likeliest, config=config))
    right, every = [], questions.questions
    with progress_bar(len(every), "glued", "question", progress) as bar:
        for question in every:
            size = len(question.prompt) + len(question.answer) - 1
            room = -(-size // _BUCKET) * _BUCKET
            tokens = np.zeros(room, np.int32)
            tokens[:size] = (*question.prompt, *question.answer[:-1])
            found = np.asarray(likeliest(weights, tokens, visible(question, room, glued)))
            # Each token is the likeliest, given the answer so far: so greedy decoding says it.
            right.append(tuple(found[len(question.prompt) - 1 : size]) == question.answer)
            bar.update()
    return grade(questions, right)


def visible(question: Question, size: int, glued: bool) -> Bool[np.ndarray, "query key"]:
    """Which of the first `size` positions each position sees."""
    place = np.arange(size)
    seen = place[None, :] <= place[:, None]
    if not glued:
        return seen
    chunk = np.searchsorted(question.chunks, place, side="right")
    own = chunk[:, None] == chunk[None, :]
    return seen & (own | (place >= question.end)[:, None])


def _likeliest(
    weights: ModelWeights, tokens: Array, seen: Bool[Array, "query key"], *, config: ModelConfig
) -> Array:
    attend = partial(_masked_attention, seen=seen)
    return forward(weights, config, tokens[None], attend=attend).logits[0].argmax(axis=-1)


def _masked_attention(
    query: Float[Array, "seqs positions heads head_dim"],
    key: Float[Array, "seqs positions kv_heads head_dim"],
    value: Float[Array, "seqs positions kv_heads head_dim"],
    *,
    seen: Bool[Array, "positions positions"],
) -> Float[Array, "seqs positions heads head_dim"]:
    return jax.nn.dot_product_attention(query, key, value, mask=seen[None, None])
