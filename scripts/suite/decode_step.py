"""A whole decode step of the engine at the shapes of Llama-3-8B, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.latents import layer_shapes

from pallas_kernels.deltakv import Grid
from sparsejax.cache.group import CacheGroup, dense_group
from sparsejax.cache.plan import Plan
from sparsejax.engine.rows import neutral_row, stack_rows
from sparsejax.engine.sampler import SamplingRows
from sparsejax.engine.state import DeviceState, initial_state
from sparsejax.engine.step import COMPRESSOR, StepKey, StepShape
from sparsejax.models.config import DecoderConfig, RopeConfig
from sparsejax.models.decoder import Decoder
from sparsejax.models.params import param_shapes
from sparsejax.sparsity.policy import SparsityConfig
from sparsejax.sparsity.selector import Selector
from suite import paged
from suite.records import Run

LLAMA_8B = DecoderConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=500000.0),
    max_position_embeddings=131072,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """`rows` sequences of `context` tokens each, in pages of `page`, read densely or under the preset ``deltakv``: its
    `filters` hold int4 and select, the other layers hold latents."""

    config: DecoderConfig
    rows: int
    context: int
    page: int = 32
    dtype: Any = jnp.bfloat16
    implementation: Any = None
    platform: str = "gpu"  # whose layouts the pools have
    sparsity: str = "dense"
    filters: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.sparsity not in ("dense", "deltakv"):
            raise ValueError(f"sparsity must be dense or deltakv; got {self.sparsity!r}")

    @property
    def width(self) -> int:
        return -(-self.context // self.page)

    @property
    def shape(self) -> StepShape:
        decoder = Decoder(self.config, self.dtype)
        return StepShape(decoder, self.page, spare_row=self.rows, max_entries=2 * self.rows + 1)

    def state(self) -> DeviceState:
        """The device state with zeroed pools."""
        rows = stack_rows([neutral_row(self.config.vocab_size)] * (self.rows + 1))
        return initial_state(
            self.config,
            (self.group,),
            num_rows=self.rows,
            table_width=self.width,
            sampling=jax.tree.map(jnp.asarray, SamplingRows(**rows)),
            implementation=self.implementation,
            selector=self.selector,
        )

    @property
    def selector(self) -> Selector | None:
        policy = SparsityConfig.coerce(self.sparsity).within(self.filters)
        return Selector.of((policy,), self.page, self.config.num_kv_heads, self.context)

    @property
    def group(self) -> CacheGroup:
        pages, dtype = self.rows * self.width + 1, np.dtype(self.dtype)
        if self.sparsity == "dense":
            return dense_group(self.config, self.page, dtype, pages, self.platform)
        plan = Plan(Grid(self.page), layer_shapes(self.config)["g"][-1], self.filters)
        return plan.group(self.config, dtype, pages, self.rows, self.platform)

    @property
    def compressor(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """Shapes of the compressor's weights by layer."""
        sparse = [layer for layer in range(self.config.num_layers) if layer not in self.filters]
        return {} if self.sparsity == "dense" else {layer: layer_shapes(self.config) for layer in sparse}

    @property
    def pool_bytes(self) -> int:
        return self.group.pool_bytes

    def shapes(self, key: StepKey) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
        """The program and its arguments as shapes; the first one is to be donated."""
        params = filled(param_shapes(self.config), lambda shape: jax.ShapeDtypeStruct(shape, self.dtype))
        if self.compressor:
            params[COMPRESSOR] = filled(self.compressor, lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32))
        packed = jax.ShapeDtypeStruct((self.shape.packing(key).size,), jnp.int32)
        return self.shape.program(key), (jax.eval_shape(self.state), params, packed)

    def arrays(self, key: StepKey) -> tuple[DeviceState, Any, np.ndarray]:
        """Random weights and pools of a dense setup; every row is at its last token."""
        state = self.state()
        rng = np.random.default_rng(0)
        pages = rng.permutation(self.rows * self.width).reshape(self.rows, self.width) + 1
        tables = np.zeros(state.tables.shape, np.int32)
        tables[: self.rows] = pages
        kv = jax.tree.map(lambda pool: paged.normal(1, pool.shape, pool.dtype), state.kv)
        state = dataclasses.replace(state, kv=kv, tables=jnp.asarray(tables))
        packed, fields = self.shape.packing(key).empty()
        fields["entry_rows"][:] = self.rows
        fields["rows"][:] = np.arange(self.rows)
        fields["tokens"][:] = rng.integers(0, self.config.vocab_size, self.rows)
        fields["positions"][:] = self.context - key.num_steps
        return state, weights(self.config, self.dtype), packed


def filled(shapes: Any, make: Callable[[tuple[int, ...]], Any]) -> Any:
    """A tree of shapes with what `make` gives for each."""
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A weight made on the device; norms are ones."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return paged.normal(len(shape), shape, dtype) * jnp.asarray(math.prod(shape[1:]) ** -0.5, dtype)


@functools.lru_cache(maxsize=1)
def weights(config: DecoderConfig, dtype: Any) -> Any:
    """Random weights, kept for the next case of the same model."""
    return filled(param_shapes(config), functools.partial(random, dtype=dtype))


def cases(tiny: bool) -> Iterator[tuple[str, Run]]:
    """The cases of this stage."""
    if tiny:
        small = dataclasses.replace(
            LLAMA_8B, num_layers=2, hidden_size=64, intermediate_size=96, vocab_size=256, num_heads=4,
            num_kv_heads=2, head_dim=16, windows=(),
        )  # fmt: skip
        yield "2 x 64", functools.partial(timed, Setup(small, 2, 64, dtype=jnp.float32), 1)
        return
    for rows, context, steps in ((32, 4096, 1), (32, 4096, 4), (1, 4096, 1), (8, 32768, 1)):
        setup = Setup(LLAMA_8B, rows, context)
        yield f"{rows} x {context}, {steps} steps per call", functools.partial(timed, setup, steps)
    yield "1 x 4096, XLA", functools.partial(timed, Setup(LLAMA_8B, 1, 4096, implementation="xla"), 1)


def timed(setup: Setup, steps: int, calls: int = 10) -> dict[str, Any]:
    """Seconds per decode step, tokens per second, bytes that a step must read."""
    key = StepKey(chunk=0, rows=setup.rows, num_steps=steps)
    state, params, packed = setup.arrays(key)
    program = jax.jit(setup.shape.program(key), donate_argnums=0)
    start = time.perf_counter()
    program = program.lower(state, params, packed).compile()
    compiled = time.perf_counter() - start
    memory = program.memory_analysis()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            state, outputs = program(state, params, packed)
        jax.block_until_ready(outputs)
        best = min(best, (time.perf_counter() - start) / calls / steps)
    finite = bool(np.isfinite(np.asarray(outputs[0])[..., 1].view(np.float32)).all())
    if not finite:
        raise AssertionError("the step gave a log-probability that is not finite")
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embed"].nbytes
    read += setup.rows * setup.context * setup.pool_bytes // ((setup.rows * setup.width + 1) * setup.page)
    return {
        "seconds": best,
        "tokens_per_s": setup.rows / best,
        "bytes": read,
        "bytes_per_s": read / best,
        "compile_s": round(compiled, 1),
        "pools_in_place": memory is not None and memory.alias_size_in_bytes >= setup.pool_bytes,
    }
