"""The text that models are judged by where the user gives none: modules of Python's library."""

import numpy as np
from jaxtyping import Int

from moe_jax.engine.engine import Engine
from moe_jax.evaluate.corpus import read_library, split_documents
from moe_jax.evaluate.questions import text_start


def held_out_texts(engine: Engine, every: int = 24) -> list[Int[np.ndarray, " _"]]:
    """Tokens of every n-th module that the reference model was not trained on.

    Each starts as the model's texts start. Raises ValueError if the model has no tokenizer.
    """
    start = text_start(engine)
    assert engine.tokenizer is not None, "text_start would have refused it"
    _, held_out = split_documents(read_library())
    encoded = [engine.tokenizer.encode_chat(one.text) for one in held_out[::every]]
    return [np.array([*start, *tokens], np.int32) for tokens in encoded]
