"""The text that models are judged by where the user gives none: modules of Python's library."""

import numpy as np
from jaxtyping import Int

from moe_jax.engine.engine import Engine
from moe_jax.evaluate.corpus import read_library, split_documents
from moe_jax.evaluate.questions import text_start

_TEXTS = 12


def held_out_texts(engine: Engine) -> list[Int[np.ndarray, " _"]]:
    """Tokens of files that the reference model was not trained on, each as its texts start.

    About a dozen, evenly spread over all that the library of this Python has: 3.13 has a third as
    many as 3.11. Raises ValueError if the model has no tokenizer.
    """
    start = text_start(engine)
    assert engine.tokenizer is not None, "text_start would have refused it"
    _, held_out = split_documents(read_library())
    spread = held_out[:: max(1, len(held_out) // _TEXTS)]
    encoded = [engine.tokenizer.encode_chat(one.text) for one in spread]
    return [np.array([*start, *tokens], np.int32) for tokens in encoded]
