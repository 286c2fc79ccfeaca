"""Options that are refused: those that do not exist here, and combinations that mean nothing.

Knows options by name and what each way of decoding can honour; single values are checked before.
"""

from collections.abc import Collection, Mapping
from typing import Any

_DIVERSE = (
    "diverse beam search is not built; use num_beams with num_return, or draw texts with several "
    "seeds"
)
_CONSTRAINED = "constrained beam search is not built; use allowed_tokens without beams"

# Options of transformers that change which text comes out, and what to do without them.
REFUSED = {
    "num_beam_groups": _DIVERSE,
    "diversity_penalty": _DIVERSE,
    "constraints": _CONSTRAINED,
    "force_words_ids": _CONSTRAINED,
}

_NOT_WITH_BEAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_tokens",
    "logprobs",
    "stop",
    "prompt_lookup",
)
_ONLY_WITH_BEAMS = ("length_penalty", "early_stopping")
_NOT_WITH_PROMPT_LOOKUP = (
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_tokens",
    "min_tokens",
)


def check_conflicts(options: Mapping[str, Any], changed: Collection[str]) -> None:
    """Raises ValueError for options that cannot hold at once; it names them and the way out.

    Args:
      options: every option's value.
      changed: the names of those whose value is not the default.
    """
    beams = options["num_beams"]
    if options["min_tokens"] > options["max_tokens"]:
        raise ValueError(
            f"min_tokens={options['min_tokens']} is more than "
            f"max_tokens={options['max_tokens']}; raise max_tokens or lower min_tokens"
        )
    if options["num_return"] > beams:
        raise ValueError(
            f"num_return={options['num_return']} is more than num_beams={beams}; raise num_beams, "
            "or give the prompt several times with different seeds"
        )
    if beams > 1:
        _refuse(
            [name for name in _NOT_WITH_BEAMS if name in changed],
            f"num_beams={beams} ranks whole texts by the model's own probabilities",
            "num_beams=1",
        )
    else:
        _refuse(
            [name for name in _ONLY_WITH_BEAMS if name in changed],
            "num_beams=1 has no texts to rank",
            "num_beams above 1",
        )
    if options["prompt_lookup"]:
        _refuse(
            [name for name in _NOT_WITH_PROMPT_LOOKUP if name in changed],
            f"prompt_lookup={options['prompt_lookup']} compares drafts with the model's likeliest "
            "tokens",
            "prompt_lookup=0",
        )


def _refuse(names: list[str], reason: str, otherwise: str) -> None:
    if names:
        raise ValueError(
            f"{reason}, so it cannot be combined with {', '.join(names)}; leave that out, or set "
            f"{otherwise}"
        )
