"""Calls of the ops at serving sizes, as shapes: what is lowered and compiled without a device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import deltakv_pools
from pallas_kernels.aot.report import Report
from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import DeltaPools

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGES = (16, 32, 64, 128)
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
CODECS = ("int8", "fp8", "int4")

ROWS, HEADS, KV_HEADS = 32, 32, 8
WINDOW = 16  # last queries of a row
LISTED = 4096  # list entries per row: a row's lists do not fit a TPU's scalar memory
POOL_TOKENS = 1 << 18  # 4 GiB of the widest float32 pools: the smallest chip holds 16
BOUNDED = 8192  # pages that have bounds
SELECTED = 128  # pages that a layer of latents reads of each row
CHUNK = 512


class Target(Protocol):
    """A module of this package that compiles for one platform."""

    PLATFORM: str
    BACKEND: str
    TARGETS: tuple[str, ...]  # devices
    CALL: str  # what a lowered program calls a kernel of ours

    def available(self) -> str | None:
        """None if programs can be compiled here, else the reason why not."""

    def lower(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
        """The program lowered with plain jaxlib, as text."""

    def compile(self, function: Callable[..., Any], arguments: tuple[Any, ...], target: str, donate=()) -> Report:
        """The program compiled for one of TARGETS."""

    def coded_pools(self, pages: int, kv_heads: int, page: int, head_dim: int, codec: str) -> tuple[Any, Any, Any]:
        """Codes of K and V and their scales, of one layer, as this platform stores them."""

    def pools(self, pages: int, kv_heads: int, page: int, head_dim: int, dtype: Any) -> tuple[Any, Any]:
        """K and V pools of one layer as this platform stores them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: an op, the dtype or codec of the pages, head dim, page size and options that are static."""

    op: str
    dtype: str
    head_dim: int
    page: int
    options: tuple[tuple[str, Any], ...] = ()
    per_head: bool = False  # one list per KV head, with logical ids and sinks

    def __str__(self) -> str:
        extra = [f"{name} {value}" for name, value in self.options] + ["head lists"] * self.per_head
        return ", ".join([f"{self.op} {self.dtype} D{self.head_dim} P{self.page}", *extra])

    def build(self, target: Target) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function and its arguments as shapes."""
        return BUILDERS[self.op](self, target)


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _attention(case: Case, target: Target, tokens: int, *more: Any):
    """An op that gives out and log-sum-exp."""
    dtype = DTYPES.get(case.dtype, jnp.bfloat16)
    pools = target.coded_pools if case.dtype in CODECS else target.pools
    stored = case.dtype if case.dtype in CODECS else dtype
    lists = KV_HEADS if case.per_head else 1
    listed = LISTED // 8 if case.per_head else LISTED
    arguments = [
        _shape(tokens, HEADS, case.head_dim, dtype=dtype),
        *pools(POOL_TOKENS // case.page, KV_HEADS, case.page, case.head_dim, stored),
        _shape(ROWS, lists, listed),
        _shape(ROWS, lists),
        _shape(ROWS),
        *more,
    ]
    named = ()
    if case.per_head:
        named = ("logical_ids", "sinks")
        arguments += [_shape(ROWS, lists, listed), _shape(HEADS, dtype=jnp.float32)]
    op = functools.partial(
        getattr(pallas_kernels, case.op), implementation=target.BACKEND, return_lse=True, **dict(case.options)
    )

    def call(*given):
        plain = given[: len(given) - len(named)]
        return op(*plain, **dict(zip(named, given[len(plain) :], strict=True)))

    return call, tuple(arguments)


def _decode(case: Case, target: Target):
    return _attention(case, target, ROWS)


def _prefill(case: Case, target: Target):
    return _attention(case, target, CHUNK, _shape(ROWS + 1))


def _scores(case: Case, target: Target):
    width = -(-2 * case.head_dim // 128) * 128
    op = functools.partial(pallas_kernels.page_scores, implementation=target.BACKEND, **dict(case.options))
    return op, (
        _shape(ROWS, HEADS, case.head_dim, dtype=jnp.bfloat16),
        _shape(BOUNDED, KV_HEADS, width, dtype=DTYPES[case.dtype]),
        _shape(ROWS, 1, LISTED),
        _shape(ROWS, 1),
    )


def _mass(case: Case, target: Target):
    """Queries against keys alone: one per row, a chunk (with "chunk"), or the last ones of each row."""
    dtype, options = DTYPES.get(case.dtype, jnp.bfloat16), dict(case.options)
    chunk = options.pop("chunk", False)
    windows = case.op == "window_scores"
    extents, scales = (POOL_TOKENS // case.page, KV_HEADS, case.page, case.head_dim), []
    if case.dtype in CODECS:
        keys, _, *scales = target.coded_pools(*extents, case.dtype)
    else:
        keys = target.pools(*extents, dtype)[0]
    tokens = CHUNK if chunk else ROWS
    query = (ROWS, WINDOW, HEADS) if windows else (tokens, HEADS)
    lists = [_shape(ROWS, 1, LISTED), _shape(ROWS, 1), _shape(ROWS)]
    norms = [] if windows else [_shape(tokens, HEADS, dtype=jnp.float32), *[_shape(ROWS + 1)] * chunk]
    op = functools.partial(getattr(pallas_kernels, case.op), implementation=target.BACKEND, **options)
    arguments = (_shape(*query, case.head_dim, dtype=dtype), keys, *lists, *norms)
    if not scales:
        return op, arguments
    return (lambda *given: op(*given[:-1], scales=given[-1])), (*arguments, *scales)


def _moved(case: Case, target: Target):
    """As many listed pages as a chunk of a long row sees."""
    dim, extents = case.head_dim, (POOL_TOKENS // case.page, KV_HEADS, case.page, case.head_dim)
    dense = target.pools(*extents, DTYPES.get(case.dtype, jnp.bfloat16))
    if case.op == "page_bounds":
        padded = dense[0].shape[-1] != dim
        width = -(-2 * dim // 128) * 128 if padded else 2 * dim
        pools = (_shape(extents[0], KV_HEADS, width, dtype=dense[0].dtype), dense[0])
    else:
        pools, coded = dense, target.coded_pools(*extents, case.dtype)
        pools = (*dense, *coded) if case.op == "open_pages" else (*coded, *dense)
    static = {} if case.op == "page_bounds" else {"head_dim": dim}
    op = functools.partial(getattr(pallas_kernels, case.op), implementation=target.BACKEND, **static)
    return (lambda *given: op(*given[:-1], count=given[-1])), (*pools, _shape(LISTED), _shape(LISTED), _shape())


def _latents(case: Case, target: Target):
    """Pages of one layer under DeltaKV with a latent of so many channels."""
    options = dict(case.options)
    latent, kv_heads = options.pop("latent"), options.pop("kv_heads", KV_HEADS)
    grid, dtype = Grid(case.page, **{"latents": case.dtype} | options), jnp.bfloat16
    extents = (POOL_TOKENS // case.page, kv_heads, case.head_dim, 1, latent, dtype, target.PLATFORM)
    pools = deltakv_pools.shapes(grid, *extents)
    given = [
        _shape(ROWS, HEADS // KV_HEADS * kv_heads, case.head_dim, dtype=dtype),
        DeltaPools(**{name: None if one is None else _shape(*one[0], dtype=one[1]) for name, one in pools.items()}),
        {"g": _shape(1, 2 * kv_heads * case.head_dim, latent, dtype=dtype)},
        _shape(case.head_dim // 2, dtype=jnp.float32),
        _shape(ROWS, 1, SELECTED),
        _shape(ROWS, 1),
        _shape(ROWS),
        _shape(ROWS, LISTED),
        _shape(ROWS, 1, SELECTED),
    ]
    op = functools.partial(
        pallas_kernels.deltakv_decode_attention, grid=grid, implementation=target.BACKEND, return_lse=True
    )
    return (lambda *arrays: op(*arrays[:-1], logical_ids=arrays[-1])), tuple(given)


BUILDERS: dict[str, Callable[[Case, Target], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "paged_decode_attention": _decode,
    "paged_prefill_attention": _prefill,
    "quantized_decode_attention": _decode,
    "quantized_prefill_attention": _prefill,
    "open_pages": _moved,
    "quantize_pages": _moved,
    "page_bounds": _moved,
    "page_scores": _scores,
    "attention_mass": _mass,
    "window_scores": _mass,
    "deltakv_decode_attention": _latents,
}
STORED = {
    "paged_decode_attention": tuple(DTYPES),
    "paged_prefill_attention": tuple(DTYPES),
    "quantized_decode_attention": CODECS,
    "quantized_prefill_attention": CODECS,
}
OPTIONS = (("window", 4096), ("soft_cap", 30.0))
MASSES = (
    (),
    (("group", "max"),),
    (("chunk", True), ("per_token", True), *OPTIONS),
    (("chunk", True), ("group", "max"), ("per_token", True)),
    (("chunk", True), ("group", "max")),
)


# Latents as in the compressors that docs/deltakv.md counts the bytes of, then what a page may differ in.
LATENTS = (
    (32, (("latent", 512),)),
    (32, (("latent", 256), ("kv_heads", 4))),
    (32, (("latent", 384),)),
    (32, (("latent", 512), ("neighbours", 4))),
    (32, (("latent", 512), ("stride", 8))),
    (64, (("latent", 512),)),
    (128, (("latent", 512),)),
)


# Of what differs from another op in little: every head dim in pages of 32, and every page size with head dim 128.
SOME = (*((dim, 32) for dim in HEAD_DIMS), *((128, page) for page in PAGES if page != 32))


def cases() -> Iterator[Case]:
    """Every op x dtype or codec x head dim x page size, and the options once per op."""
    product = tuple(itertools.product(HEAD_DIMS, PAGES))
    for op in STORED:
        for dtype, size in itertools.product(STORED[op], SOME if op == "quantized_prefill_attention" else product):
            yield Case(op, dtype, *size)
        yield Case(op, STORED[op][0], 128, 32, OPTIONS, per_head=True)
    for op, codec, size in itertools.product(("open_pages", "quantize_pages"), CODECS, SOME):
        yield Case(op, codec, *size)
    for dtype, size in itertools.product(DTYPES, SOME):
        yield Case("page_bounds", dtype, *size)
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):  # page sizes do not matter to bounds
        yield Case("page_scores", dtype, head_dim, 32)
    yield Case("page_scores", "bf16", 128, 32, (("group", "mean"),))
    for dtype in (*DTYPES, *CODECS):
        for size in SOME if dtype in CODECS else product:
            yield Case("attention_mass", dtype, *size)
    for dtype, options in itertools.product(("bf16", "int4"), MASSES[1:]):
        yield Case("attention_mass", dtype, 128, 32, options)
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        yield Case("window_scores", dtype, head_dim, 32)
    yield from (Case("deltakv_decode_attention", "int4", 128, page, options) for page, options in LATENTS)
    yield Case("deltakv_decode_attention", "int8", 128, *LATENTS[0])


def sample() -> Iterator[Case]:
    """A few cases that cover every value of every axis."""
    yield Case("page_scores", "bf16", 128, 32)
    yield from (Case("attention_mass", dtype, 128, 32, options) for dtype in ("bf16", "int4") for options in MASSES)
    yield from (Case("attention_mass", dtype, 128, 32) for dtype in ("int8", "fp8"))
    yield Case("window_scores", "bf16", 128, 32)
    yield from (Case("deltakv_decode_attention", "int4", 128, page, options) for page, options in LATENTS[:2])
    yield from (Case(op, codec, 128, 32) for op in ("open_pages", "quantize_pages") for codec in CODECS)
    yield Case("page_bounds", "bf16", 128, 32)
    for op in STORED:
        first, *others = STORED[op]
        if len(others) > 1:
            yield from (Case(op, dtype, 128, 32) for dtype in STORED[op])
            continue
        for i, head_dim in enumerate(HEAD_DIMS):
            yield Case(op, first, head_dim, PAGES[i % len(PAGES)])
        yield from (Case(op, dtype, 128, 32) for dtype in others)
        yield Case(op, first, 128, 32, OPTIONS, per_head=True)
