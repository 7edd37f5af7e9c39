"""Whole pages of all layers between the device and bytes on the host, by programs of a few fixed sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from sparsejax.cache.tiers.host import Payload
from sparsejax.engine.compile import abstract
from sparsejax.engine.state import DeviceState

if TYPE_CHECKING:
    from sparsejax.engine.runner import Runner

BUCKETS = (1, 4, 16)
"""Pages that one program call moves; what is missing is filled up with the dump page."""


@dataclass(frozen=True)
class _Kind:
    """The per-page arrays of one shape and dtype: they travel as one array ``[pages, arrays, ...]``.

    Attributes:
        leaves: their places among all per-page arrays.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    leaves: tuple[int, ...]

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (len(self.leaves), *self.shape)

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self.page_shape)) * self.dtype.itemsize


class Saved:
    """Pages on their way to the host: what the device does next to them changes nothing here."""

    def __init__(self, batches: list[tuple[int, tuple[Array, ...]]]):
        self._batches = batches
        for array in jax.tree.leaves([arrays for _, arrays in batches]):
            array.copy_to_host_async()

    def payloads(self) -> list[Payload]:
        """Waits for the bytes of every page, in the order of the page ids; each payload owns its memory."""
        return [page for count, arrays in self._batches for page in _pack([np.asarray(a) for a in arrays], count)]


class Transfers:
    """Reads pages out of the pools of a runner and writes them back in place, bit for bit.

    A page's payload is every array of it (`PagedKV.page_arrays`: K and V, codes, scales, bounds), of all layers, in one
    run of bytes. Both directions run in the order of the steps around them: a page that a later step writes over was
    read before, one that a later step reads was written before.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._kinds = _kinds(runner.state)
        self.page_bytes = sum(kind.page_bytes for kind in self._kinds)

    @property
    def description(self) -> str:
        """What a payload consists of, byte by byte: others of the same description can be loaded."""
        return repr([(kind.page_shape, kind.dtype.name) for kind in self._kinds])

    def warm(self) -> None:
        """Compiles every program, so that nothing is compiled later."""
        for size in BUCKETS:
            self._save_program(size)
            self._load_program(size)

    def begin_save(self, page_ids: Sequence[int]) -> Saved:
        """Starts reading pages and returns at once; steps dispatched later may write over them."""
        batches = []
        for ids in _cut(page_ids):
            program = self._save_program(size := _bucket(len(ids)))
            self._runner.state, arrays = program(self._runner.state, _padded(ids, size))
            batches.append((len(ids), arrays))
        return Saved(batches)

    def save(self, page_ids: Sequence[int]) -> list[Payload]:
        """The payload of each page."""
        return self.begin_save(page_ids).payloads()

    def load(self, page_ids: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Writes payloads into pages, before any step that is dispatched later.

        Args:
            page_ids: distinct pages, as many as payloads; nobody else may read them yet.
        """
        start = 0
        for ids in _cut(page_ids):
            program = self._load_program(size := _bucket(len(ids)))
            arrays = self._unpack(payloads[start : start + len(ids)], size)
            self._runner.state = program(self._runner.state, _padded(ids, size), arrays)
            start += len(ids)

    def _unpack(self, payloads: Sequence[Payload], size: int) -> tuple[np.ndarray, ...]:
        """Arrays of each kind for a program of `size` pages: zeros, which are finite, in pages that none fills."""
        arrays, start = [], 0
        for kind in self._kinds:
            stop = start + kind.page_bytes
            raw = np.zeros((size, kind.page_bytes), np.uint8)
            for row, payload in zip(raw, payloads, strict=False):
                row[:] = payload[start:stop]
            arrays.append(raw.view(kind.dtype).reshape(size, *kind.page_shape))
            start = stop
        return tuple(arrays)

    def _save_program(self, size: int) -> jax.stages.Compiled:
        def save(state: DeviceState, ids: Int[Array, " S"]) -> tuple[DeviceState, tuple[Shaped[Array, "S ..."], ...]]:
            leaves = jax.tree.leaves(state.kv.page_arrays())
            return state, tuple(jnp.stack([leaves[i][ids] for i in kind.leaves], 1) for kind in self._kinds)

        ids = jax.ShapeDtypeStruct((size,), jnp.int32)
        return self._runner.programs.get(("save", size), lambda: (save, (abstract(self._runner.state), ids)))

    def _load_program(self, size: int) -> jax.stages.Compiled:
        def load(state: DeviceState, ids: Int[Array, " S"], arrays: tuple[Shaped[Array, "S ..."], ...]) -> DeviceState:
            leaves, tree = jax.tree.flatten(state.kv.page_arrays())
            for kind, values in zip(self._kinds, arrays, strict=True):
                for at, leaf in enumerate(kind.leaves):
                    leaves[leaf] = leaves[leaf].at[ids].set(values[:, at])
            return replace(state, kv=state.kv.with_page_arrays(jax.tree.unflatten(tree, leaves)))

        def build():
            arrays = tuple(jax.ShapeDtypeStruct((size, *kind.page_shape), kind.dtype) for kind in self._kinds)
            return load, (abstract(self._runner.state), jax.ShapeDtypeStruct((size,), jnp.int32), arrays)

        return self._runner.programs.get(("load", size), build)


def _kinds(state: DeviceState) -> tuple[_Kind, ...]:
    leaves: dict[tuple, list[int]] = {}
    for at, leaf in enumerate(jax.tree.leaves(state.kv.page_arrays())):
        leaves.setdefault((leaf.shape[1:], np.dtype(leaf.dtype)), []).append(at)
    return tuple(_Kind(*kind, tuple(places)) for kind, places in leaves.items())


def _pack(arrays: list[np.ndarray], count: int) -> list[Payload]:
    """The first `count` pages of arrays ``[pages, arrays, ...]``, each in one run of bytes."""
    raw = [array.reshape(len(array), -1).view(np.uint8) for array in arrays]
    return [np.concatenate([part[page] for part in raw]) for page in range(count)]


def _cut(page_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(page_ids), BUCKETS[-1]):
        yield page_ids[start : start + BUCKETS[-1]]


def _bucket(count: int) -> int:
    return next(size for size in BUCKETS if size >= count)


def _padded(ids: Sequence[int], size: int) -> np.ndarray:
    padded = np.zeros(size, np.int32)
    padded[: len(ids)] = ids
    return padded
