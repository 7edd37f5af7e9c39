"""`EngineConfig`: every setting of an engine, validated with messages that name the fix.

This module imports no JAX, so the command line can print help and reject a bad flag in milliseconds.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sparsejax.errors import ConfigError
from sparsejax.sparsity.policy import declared

Warmup = Literal["none", "lazy", "full"]
DTYPES = ("auto", "float32", "bfloat16")
BACKENDS = ("auto", "xla", "pallas", "reference", "mosaic_gpu", "mosaic_tpu")
PAGE_SIZES = (16, 32, 64, 128)
DEFAULT_COMPILE_CACHE = "~/.cache/sparsejax/compile"


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an `Engine`. Sizes are tokens or bytes, as named.

    Attributes:
        model: local checkpoint directory or hub id; None is the checkpoint that ships in the package.
        tokenizer: directory or hub id of the tokenizer; None is the model's own.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"`` or ``"bfloat16"``.
        max_model_len: longest sequence, prompt plus output, in tokens; None is the model's limit.
        page_size: tokens of a KV page.
        kv_memory_bytes: bytes of the KV pools; None sizes them from ``memory_utilization``.
        memory_utilization: share of device memory that weights and pools may take (on CPU: share of the
            memory that is free at start, and never more than ``max_num_seqs`` full sequences need).
        weight_memory_bytes: device memory for weights; layers that it does not hold stay in main memory and are copied
            to the device ahead of use, in every step. None holds all.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens one step computes; prefill is chunked to fit.
        num_decode_steps: decode steps done in one device call when nothing waits; 1 turns this off.
        sparsity: what requests read of their KV cache and how it is stored: a preset, several joined
            (``snapkv+int4``), a mapping or a `SparsityConfig`, or a list of those that requests may choose from
            (``SamplingParams.sparsity``), the default first. All of them share one codec.
        enable_prefix_caching: keep full pages of prompts as long as nobody needs the room, so that a request that
            begins with the same tokens starts from them, with the same results as without.
        cache_outputs: keep pages of generated tokens too, so that the next turn of a chat starts after the last answer.
            Decode steps round differently than prompts are read, so results may then depend on what is cached.
        conversation_pages: most KV pages, of all cache groups, that conversations hold between their turns
            (``SamplingParams.keep_alive``); None is half of all, 0 keeps none.
        host_kv_bytes: main memory for full pages that the device has no room for; they come back where that is faster
            than computing them again.
        disk_kv_path: directory for pages that main memory has no room for; the next engine of the same model on it
            starts with them. One engine at a time.
        disk_kv_bytes: most bytes that these take on the disk.
        warmup: ``"full"`` compiles every step program before the constructor returns, ``"lazy"`` those that
            a first request needs, ``"none"`` each at its first use.
        compile_cache_dir: where compiled programs persist; ``""`` turns the cache off.
        seed: seed of the sampling streams of requests that bring none.
        backend: which implementation serves the array operations.
    """

    model: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    page_size: int = 32
    kv_memory_bytes: int | None = None
    memory_utilization: float = 0.9
    weight_memory_bytes: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    num_decode_steps: int = 4
    sparsity: Any = "dense"
    enable_prefix_caching: bool = True
    cache_outputs: bool = False
    conversation_pages: int | None = None
    host_kv_bytes: int = 0
    disk_kv_path: str | None = None
    disk_kv_bytes: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    warmup: Warmup = "lazy"
    compile_cache_dir: str | None = None
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("warmup", self.warmup, get_args(Warmup))
        _one_of("page_size", self.page_size, PAGE_SIZES)
        declared(self.sparsity)
        for name in ("max_num_seqs", "max_num_batched_tokens", "num_decode_steps"):
            _integer(name, getattr(self, name), minimum=1)
        for name in ("max_model_len", "kv_memory_bytes", "weight_memory_bytes"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), minimum=1)
        if self.conversation_pages is not None:
            _integer("conversation_pages", self.conversation_pages, minimum=0)
        _integer("seed", self.seed)
        if not isinstance(self.memory_utilization, (int, float)) or not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization={self.memory_utilization!r}: give a share of memory in (0, 1], for example 0.9."
            )
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be larger than max_num_seqs="
                f"{self.max_num_seqs}, so that a prompt can advance while every other sequence decodes: "
                f"raise it to at least {self.max_num_seqs + 1}, or lower max_num_seqs."
            )
        self._check_tiers()
        self._refuse_unbuilt()

    def _check_tiers(self) -> None:
        for name in ("host_kv_bytes", "disk_kv_bytes"):
            _integer(name, getattr(self, name), minimum=0)
        if self.disk_kv_path is not None and not isinstance(self.disk_kv_path, str):
            raise ConfigError(f"disk_kv_path={self.disk_kv_path!r} must be a path as text, or None.")
        if (self.disk_kv_path is None) != (self.disk_kv_bytes == 0):
            raise ConfigError(
                f"disk_kv_path={self.disk_kv_path!r} and disk_kv_bytes={self.disk_kv_bytes}: a disk tier needs both, "
                "a directory and how many bytes it may take; leave both out for none."
            )
        if (self.host_kv_bytes or self.disk_kv_path) and not self.enable_prefix_caching:
            raise ConfigError(
                "host_kv_bytes and disk_kv_path hold pages of the prefix cache, which enable_prefix_caching=False "
                "turns off: turn it on, or leave them out."
            )

    def _refuse_unbuilt(self) -> None:
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "quantization",
        ):
            default = _FIELDS[name].default
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not supported by this version; leave it at {default!r}."
                )

    @classmethod
    def make(
        cls, model: str | None = None, config: EngineConfig | None = None, **overrides: Any
    ) -> EngineConfig:
        """Merges a config with keyword overrides.

        Raises:
            ConfigError: an override is no field (the closest name is suggested), or a value is invalid.
        """
        for name in overrides:
            if name not in _FIELDS:
                close = difflib.get_close_matches(name, _FIELDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are: {', '.join(_FIELDS)}."
                raise ConfigError(f"{name!r} is no engine setting; {hint}")
        if model is not None:
            overrides["model"] = str(model)
        return dataclasses.replace(config or cls(), **overrides)

    def compile_cache_path(self) -> Path | None:
        """Directory of the persistent compile cache, or None when it is off."""
        if self.compile_cache_dir == "":
            return None
        return Path(self.compile_cache_dir or DEFAULT_COMPILE_CACHE).expanduser()


_FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def _integer(name: str, value: Any, minimum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be an integer.")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name}={value} must be at least {minimum}.")
