"""Routing traces: how many tokens each expert got in every layer of every step; files of them.

Knows neither models nor costs; made-up traces come from seeded random numbers.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from host_offload.whole_file import write_whole_file

_VERSION = 1
_MOST_BYTES = 8 << 30
_FIELDS = ("version", "counts", "gates", "tokens", "prefill", "layer", "experts_per_token")


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """What the routers did. An event is one layer of one step.

    Attributes:
      counts: tokens routed to each expert; the narrowest unsigned type that holds them.
      gates: their summed router weights; float16, or float32 beyond its range.
      tokens: tokens in each step.
      prefill: whether a step was part of a prompt; otherwise it decoded.
      layer: the index each layer has in its model.
      experts_per_token: how many experts the router chooses for a token.
    """

    counts: UInt[np.ndarray, "steps layers experts"]
    gates: Float[np.ndarray, "steps layers experts"]
    tokens: Int[np.ndarray, " steps"]
    prefill: Bool[np.ndarray, " steps"]
    layer: Int[np.ndarray, " layers"]
    experts_per_token: int

    def __post_init__(self):
        sums = self.counts.sum(-1, dtype=np.int64)
        wrong = sums != self.tokens[:, None] * self.experts_per_token
        if wrong.any():
            step, layer = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"step {step}, layer {self.layer[layer]}: the counts sum to {sums[step, layer]}, "
                f"but {self.tokens[step]} tokens choose {self.experts_per_token} experts each"
            )

    @property
    def steps(self) -> int:
        """Number of steps, prompts included."""
        return self.counts.shape[0]

    @property
    def layers(self) -> int:
        """Number of layers with experts."""
        return self.counts.shape[1]

    @property
    def experts(self) -> int:
        """Experts of each layer."""
        return self.counts.shape[2]


def make_trace(
    counts: Int[np.ndarray, "steps layers experts"] | UInt[np.ndarray, "steps layers experts"],
    experts_per_token: int,
    gates: Float[np.ndarray, "steps layers experts"] | None = None,
    prefill: Bool[np.ndarray, " steps"] | None = None,
    layer: Int[np.ndarray, " layers"] | None = None,
) -> RoutingTrace:
    """A trace of compact arrays from what a recorder has collected.

    Without gates every token weighs its experts equally; without `prefill` all steps decode.
    Raises ValueError if counts are negative, or do not sum to whole tokens.
    """
    if counts.size and counts.min() < 0:
        raise ValueError(f"counts hold {counts.min()}; tokens of an expert cannot be negative")
    if experts_per_token < 1:
        raise ValueError(f"experts_per_token is {experts_per_token}; it must be at least 1")
    steps, layers, _ = counts.shape
    narrow = np.min_scalar_type(int(counts.max())) if counts.size else np.uint8
    if gates is None:
        gates = counts / experts_per_token
    first = counts[:, 0].sum(-1, dtype=np.int64) if layers else np.zeros(steps, np.int64)
    return RoutingTrace(
        counts=counts.astype(narrow),
        gates=gates.astype(np.float16 if gates.max(initial=0) < 6e4 else np.float32),
        tokens=first // experts_per_token,
        prefill=np.zeros(steps, bool) if prefill is None else prefill,
        layer=np.arange(layers) if layer is None else layer,
        experts_per_token=experts_per_token,
    )


def save_trace(trace: RoutingTrace, path: str | Path) -> None:
    """Writes a trace as .npz, aside and renamed: a reader finds the old file or the new one."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} does not end in .npz; traces are NumPy archives, name them so")
    content = io.BytesIO()
    values = {name: getattr(trace, name) for name in _FIELDS[1:]}
    np.savez_compressed(content, version=np.int64(_VERSION), **values)
    write_whole_file(path, content.getvalue())


def load_trace(path: str | Path) -> RoutingTrace:
    """Reads what `save_trace` wrote. Nothing in the file is executed.

    Raises FileNotFoundError, and ValueError for what is no trace or does not fit together.
    """
    with open(path, "rb") as file:  # FileNotFoundError rather than "no archive"
        archive = zipfile.is_zipfile(file)
    try:
        if not archive:
            raise ValueError("it is no NumPy archive")
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, more than {_MOST_BYTES}")
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in _FIELDS if name in file}
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, ValueError) as error:
        raise ValueError(
            f"{path} is no routing trace, or damaged: {error}; record it anew"
        ) from error
    if missing := [name for name in _FIELDS if name not in fields]:
        raise ValueError(f"{path} is no routing trace: it lacks {', '.join(missing)}")
    version = int(fields.pop("version"))
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, {_VERSION} can be read; record it anew")
    ranks = {"counts": 3, "gates": 3, "tokens": 1, "prefill": 1, "layer": 1, "experts_per_token": 0}
    kinds = {"counts": "u", "gates": "f", "prefill": "b"}
    for name, rank in ranks.items():
        array = fields[name]
        if array.ndim != rank or array.dtype.kind not in kinds.get(name, "iu"):
            raise ValueError(
                f"{path}: {name} has shape {array.shape} of {array.dtype}, which is none of a "
                "trace's; record it anew"
            )
    shape = fields["counts"].shape
    sizes = {"gates": shape, "tokens": shape[:1], "prefill": shape[:1], "layer": shape[1:2]}
    for name, size in sizes.items():
        if fields[name].shape != size:
            raise ValueError(
                f"{path}: counts have shape {shape}, so {name} must have {size}; it has "
                f"{fields[name].shape}; record it anew"
            )
    try:
        return RoutingTrace(
            counts=fields["counts"],
            gates=fields["gates"],
            tokens=fields["tokens"].astype(np.int64),
            prefill=fields["prefill"],
            layer=fields["layer"].astype(np.int64),
            experts_per_token=int(fields["experts_per_token"]),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def zipf_trace(
    *,
    steps: int,
    layers: int,
    experts: int,
    experts_per_token: int,
    tokens: int = 1,
    exponent: float = 1.0,
    locality: float = 0.0,
    prompt: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """A made-up trace in which the r-th most popular expert is chosen in proportion to r^-exponent.

    Every layer has its own order of popularity. A token draws distinct experts one after another
    (Gumbel's trick: the largest of log p + noise).

    Args:
      steps: decoding steps.
      layers: layers with experts.
      experts: experts of a layer.
      experts_per_token: how many of them a token is sent to.
      tokens: sequences, one token each per step.
      exponent: 0: all experts are equally popular.
      locality: probability that an expert's noise stays as it was in the step before, in [0, 1];
        the experts of a sequence then change slowly, and are as popular as without.
      prompt: tokens of a prompt that comes first, as one step; 0: none.
      seed: of the random numbers.

    Raises ValueError if a size is not positive, experts are fewer than a token needs, or locality
    is no probability.
    """
    sizes = {"layers": layers, "experts": experts, "tokens": tokens, "steps": steps}
    sizes["experts_per_token"] = experts_per_token
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"{wrong}: a trace needs at least one of each")
    if experts_per_token > experts:
        raise ValueError(f"a token cannot choose {experts_per_token} of {experts} experts")
    if not 0 <= locality <= 1:
        raise ValueError(f"locality is {locality}; it is a probability, choose one in [0, 1]")
    random = np.random.default_rng(seed)
    rank = np.argsort(random.random((layers, experts)), axis=-1) + 1
    popularity = -exponent * np.log(rank)
    events = []
    if prompt > 0:
        noise = random.gumbel(size=(prompt, layers, experts))
        events.append(_route(popularity + noise, experts_per_token))
    noise = random.gumbel(size=(tokens, layers, experts))
    for _ in range(steps):
        events.append(_route(popularity + noise, experts_per_token))
        anew = random.random(noise.shape) >= locality
        noise = np.where(anew, random.gumbel(size=noise.shape), noise)
    return make_trace(
        np.stack([counts for counts, _ in events]),
        experts_per_token,
        np.stack([gates for _, gates in events]),
        prefill=np.arange(len(events)) < (prompt > 0),
    )


def uniform_trace(
    *,
    steps: int,
    layers: int,
    experts: int,
    experts_per_token: int,
    tokens: int = 1,
    locality: float = 0.0,
    prompt: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """A made-up trace in which all experts are equally popular; arguments as for `zipf_trace`."""
    return zipf_trace(
        steps=steps,
        layers=layers,
        experts=experts,
        experts_per_token=experts_per_token,
        tokens=tokens,
        exponent=0.0,
        locality=locality,
        prompt=prompt,
        seed=seed,
    )


def _route(
    scores: Float[np.ndarray, "tokens layers experts"], experts_per_token: int
) -> tuple[Int[np.ndarray, "layers experts"], Float[np.ndarray, "layers experts"]]:
    """Counts and summed softmax weights of the largest scores of each token."""
    chosen = np.argpartition(-scores, experts_per_token - 1, axis=-1)[..., :experts_per_token]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, chosen, True, axis=-1)
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    return mask.sum(0), weights.sum(0)
