"""The sizes and switches of a model, validated once.

Knows no file format: `moe_jax.families` turns a Hugging Face config.json into these.
"""

from dataclasses import dataclass, replace
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QkNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      kind: how frequencies are stretched beyond `original_max_positions`.
      base: theta, the base of the geometric series of wavelengths.
      factor: the stretch; None where the kind has none.
      original_max_positions: the context the model was first trained with.
      attention_factor: scales cos and sin (yarn, longrope); resolved, so 1.0 means unscaled.
      beta_fast, beta_slow, truncate: the yarn ramp, in rotations over the original context.
      low_frequency_factor, high_frequency_factor: the llama3 ramp.
      short_factor, long_factor: the longrope divisors, one per frequency.
    """

    kind: RopeKind = "default"
    base: float = 10_000.0
    factor: float | None = None
    original_max_positions: int | None = None
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_frequency_factor: float | None = None
    high_frequency_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The attention of every layer.

    Attributes:
      qkv_bias, output_bias: whether the projections add a bias.
      qk_norm: RMS norm of queries and keys over each head, over the full width, or none.
      clip_qkv: queries, keys and values are clamped to plus or minus this; None: not clamped.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNorm = "none"
    clip_qkv: float | None = None

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.heads}) must be a multiple of "
                f"num_key_value_heads ({self.kv_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {self.head_dim}")

    @property
    def qkv_width(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The expert layers.

    Attributes:
      num_experts: routed experts of a layer; of experts that were cut, their pieces.
      experts_per_token: how many of them run for a token.
      ffn: hidden width of one of them.
      shared_ffn: hidden width of the gated shared expert; None: there is no shared expert.
      normalise_gates: whether the gates of a token's chosen experts are scaled to sum to 1.
      pieces: into how many experts, always chosen together, each of the model's was cut.
    """

    num_experts: int
    experts_per_token: int
    ffn: int
    shared_ffn: int | None = None
    normalise_gates: bool = True
    pieces: int = 1

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in 1..{self.num_experts} (the number of experts), "
                f"got {self.experts_per_token}"
            )

    @property
    def routed_experts(self) -> int:
        """How many experts the router knows."""
        return self.num_experts // self.pieces

    @property
    def routed_per_token(self) -> int:
        """How many of those it chooses for a token."""
        return self.experts_per_token // self.pieces

    def cut(self, pieces: int) -> "MoEConfig":
        """These experts cut along ffn: an expert's output is the sum of what its pieces put out.

        Raises ValueError if they cannot be cut evenly.
        """
        if pieces < 1 or self.ffn % pieces:
            raise ValueError(
                f"expert_pieces={pieces}: experts of ffn {self.ffn} cannot be cut into as many "
                "equal pieces; give a divisor of it, or 1 to leave them whole"
            )
        return replace(
            self,
            num_experts=self.num_experts * pieces,
            experts_per_token=self.experts_per_token * pieces,
            ffn=self.ffn // pieces,
            pieces=self.pieces * pieces,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One model.

    Attributes:
      family: the name of its file in `moe_jax.families`.
      dense_ffn: hidden width of the layers that have no experts.
      moe_layers: per layer, whether its feed-forward part is a mixture of experts.
      windows: per layer, the sliding window in tokens; None: attention sees everything before.
      max_positions: the context length the model claims.
    """

    family: str
    vocab: int
    embed: int
    dense_ffn: int
    attention: AttentionConfig
    moe: MoEConfig
    rope: RopeConfig
    moe_layers: tuple[bool, ...]
    windows: tuple[int | None, ...]
    max_positions: int
    norm_epsilon: float = 1e-6
    activation: Activation = "silu"
    tied_embeddings: bool = False

    def __post_init__(self):
        if len(self.moe_layers) != len(self.windows):
            raise ValueError(
                f"moe_layers names {len(self.moe_layers)} layers, windows {len(self.windows)}"
            )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.moe_layers)

    @property
    def expert_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of one routed expert: gate_up [2 ffn, embed] and down [embed, ffn]."""
        return (2 * self.moe.ffn, self.embed), (self.embed, self.moe.ffn)
