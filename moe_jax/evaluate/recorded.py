"""What the embedded model said of some text when it was measured, to tell if it still does."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32
from safetensors.numpy import load_file, save

from host_offload.whole_file import write_whole_file
from moe_jax.engine.engine import Engine
from moe_jax.evaluate.perplexity import Tokens, token_nats


@dataclass(frozen=True)
class Record:
    """Texts as tokens, so that it depends on no library and no tokenizer, and their scores.

    Attributes:
      nats: minus the log probability of each token but the first of its text.
    """

    tokens: Int32[np.ndarray, "texts positions"]
    nats: Float32[np.ndarray, "texts scored"]


def make_record(engine: Engine, texts: Sequence[Tokens], positions: int = 512) -> Record:
    """Scores the first tokens of texts; those that are shorter are left out.

    Raises ValueError if all are.
    """
    starts = [np.asarray(text[:positions], np.int32) for text in texts if len(text) >= positions]
    if not starts:
        raise ValueError(f"no text has {positions} tokens; give longer ones, or ask for fewer")
    scores = [token_nats(engine, start).astype(np.float32) for start in starts]
    return Record(np.stack(starts), np.stack(scores))


def drift(engine: Engine, record: Record) -> float:
    """How far the scores of an engine are from the recorded ones: nats, the mean over tokens.

    Unlike a perplexity it sees what makes some tokens likelier and others less so.
    """
    nats = [token_nats(engine, text) for text in record.tokens]
    return float(np.abs(np.stack(nats) - record.nats).mean())


def write_record(path: Path, record: Record) -> None:
    """Writes a file that `read_record` reads."""
    write_whole_file(path, save({"tokens": record.tokens, "nats": record.nats}))


def read_record(path: Path | None = None) -> Record:
    """Reads a record; None: that of the embedded model."""
    assets = importlib.resources.files("moe_jax") / "assets"
    return Record(**load_file(path or Path(str(assets / "reference_record.safetensors"))))
