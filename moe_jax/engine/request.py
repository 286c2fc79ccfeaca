"""What a user asked for, checked and turned into tokens."""

from dataclasses import dataclass

from moe_jax.cache.paged_kv import PAGE_SIZE, pages_for
from moe_jax.checkpoint.tokenizer import Tokenizer
from moe_jax.decoding.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      limit: new tokens at most: max_tokens, or less where the KV cache ends.
      stop_tokens: ids that end the text.
      context: the last tokens before the continuation, where its first space matters.
      tokenizer: turns its tokens into text; None: it has no text.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    stop_tokens: frozenset[int]
    context: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None


def check_beams_fit(prompt: int, params: SamplingParams, pages: int) -> None:
    """Raises ValueError where the beams of a request need more KV pages than there are.

    They share the full pages of the prompt; each has pages of its own after them.
    """
    common = prompt // PAGE_SIZE
    own = pages_for(prompt + params.max_tokens - 1) - common
    needed = common + params.num_beams * own
    if needed > pages:
        raise ValueError(
            f"{params.num_beams} beams of {params.max_tokens} tokens after a prompt of {prompt} "
            f"need {needed} KV pages of {PAGE_SIZE} tokens, the cache has {pages}; lower num_beams "
            "or max_tokens, or load the model with a larger max_tokens="
        )
