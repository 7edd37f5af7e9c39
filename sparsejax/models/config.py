"""What a decoder is: frozen, hashable descriptions that are static under jit."""

from __future__ import annotations

import dataclasses
import math

from sparsejax.errors import ConfigError

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its context extension.

    Attributes:
        kind: ``default`` (plain), ``linear`` (positions divided by ``factor``), ``llama3`` or ``yarn``.
        theta: base of the wavelengths.
        factor: how many times the context grows.
        original_max_position: context length before the extension (llama3 and yarn).
        low_freq_factor, high_freq_factor: llama3 band edges, as original context / wavelength.
        beta_fast, beta_slow: yarn band edges, as rotations over the original context.
        truncate: yarn rounds its band edges outwards to whole dimensions.
        attention_factor: yarn multiplies cos and sin by this; None derives it from ``factor`` and mscale.
        mscale, mscale_all_dim: yarn's two optional magnitude exponents.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        known = ", ".join(ROPE_KINDS)
        _require(self.kind in ROPE_KINDS, f"rope kind {self.kind!r} is unknown; known: {known}")
        _require(self.theta > 1, f"rope theta must be greater than 1, got {self.theta}")
        _require(self.factor > 0, f"rope factor must be positive, got {self.factor}")
        if self.kind in ("llama3", "yarn"):
            _require(
                self.original_max_position is not None and self.original_max_position > 0,
                f"rope kind {self.kind!r} needs original_max_position_embeddings, "
                f"got {self.original_max_position}",
            )
        if self.kind == "llama3":
            _require(
                0 < self.low_freq_factor < self.high_freq_factor,
                "llama3 rope needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}",
            )

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin (1 except for yarn)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer. Static under jit: equal configurations share compiled programs.

    Attributes:
        windows: per layer, how many last tokens a query sees (its own included); None is all of them.
        dtype: the dtype the checkpoint says it was written in, None if it does not say.
        architecture: the name in ``config.json`` that chose the family; ``export`` writes it back.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    max_position_embeddings: int = 2048
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    architecture: str = "LlamaForCausalLM"
    dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(ok, f"{name} must be a positive integer, got {value!r}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        ok = isinstance(self.norm_eps, (int, float)) and self.norm_eps > 0
        _require(ok, f"norm_eps must be a positive number, got {self.norm_eps!r}")
        _require(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}",
        )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        _require(
            len(self.windows) == self.num_layers,
            f"windows must have one entry per layer ({self.num_layers}), got {len(self.windows)}",
        )
        for window in self.windows:
            ok = window is None or (isinstance(window, int) and window > 0)
            _require(ok, f"a sliding window must be a positive integer, got {window!r}")

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads

    def replace(self, **changes: object) -> DecoderConfig:
        return dataclasses.replace(self, **changes)
