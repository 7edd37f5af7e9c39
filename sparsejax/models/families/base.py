"""What a family is, and the fields of ``config.json`` that all of them spell alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.fields import Raw, integer, number, value
from sparsejax.models.families.rope_fields import rope_from, rope_to

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lives: ``tree[path][index].reshape(shape)``."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: how its ``config.json`` reads and writes, and where its tensors go.

    Attributes:
        decode: ``config.json`` to configuration. Raises ConfigError on values it cannot serve.
        encode: the inverse, without the keys that ``encode_common`` writes.
        slots: every tensor that a checkpoint of this configuration must hold.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    decode: Callable[[Raw], DecoderConfig]
    encode: Callable[[DecoderConfig], dict[str, Any]]
    slots: Callable[[DecoderConfig], list[Slot]]


def token_ids(found: Any) -> tuple[int, ...]:
    """``eos_token_id`` is absent, a number or a list."""
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def decode_common(raw: Raw, family: str, architecture: str, **fields: Any) -> DecoderConfig:
    """The fields every family spells alike; ``fields`` are those that differ."""
    heads, hidden = integer(raw, "num_attention_heads"), integer(raw, "hidden_size")
    activation = value(raw, "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"hidden_act {activation!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}"
        )
    common: dict[str, Any] = {
        "family": family,
        "architecture": value(raw, "architectures", [architecture])[0],
        "vocab_size": integer(raw, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer(raw, "intermediate_size"),
        "num_layers": integer(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": integer(raw, "num_key_value_heads", heads),
        "head_dim": integer(raw, "head_dim", max(1, hidden // heads)),
        "norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "rope": rope_from(raw),
        "activation": _ACTIVATIONS[activation],
        "tie_embeddings": bool(value(raw, "tie_word_embeddings", False)),
        "max_position_embeddings": integer(raw, "max_position_embeddings", 2048),
        "bos_token_id": value(raw, "bos_token_id"),
        "eos_token_ids": token_ids(raw.get("eos_token_id")),
        "pad_token_id": value(raw, "pad_token_id"),
        "dtype": value(raw, "dtype", value(raw, "torch_dtype")),
    }
    return DecoderConfig(**(common | fields))


def encode_common(cfg: DecoderConfig) -> dict[str, Any]:
    """The keys that ``decode_common`` reads, in the new spelling."""
    eos = cfg.eos_token_ids
    return {
        "architectures": [cfg.architecture],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "rope_parameters": rope_to(cfg.rope),
        "hidden_act": _ACTIVATION_NAMES[cfg.activation],
        "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": cfg.max_position_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "pad_token_id": cfg.pad_token_id,
    }
