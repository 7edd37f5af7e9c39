"""Whole pages of all layers between the device and bytes on the host, by programs of a few fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int, Shaped

from sparsejax.cache.tiers.host import Payload
from sparsejax.engine.compile import abstract
from sparsejax.engine.state import DeviceState

if TYPE_CHECKING:
    from sparsejax.engine.runner import Runner

BUCKETS = (1, 4, 16)
"""Pages that one program call moves; what is missing is filled up with the dump page."""

type Parts = tuple[Shaped[Array, "A ..."], ...]
"""The arrays of one page, one of each kind."""


@dataclass(frozen=True)
class Kind:
    """The per-page arrays of one shape and dtype: of a page they travel as one array ``[arrays, ...]``.

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


class PinnedPage:
    """A page in pinned host memory, from where a device reads it without a copy in between: an array of each kind.

    As an array of NumPy it is all of its bytes in one run.
    """

    def __init__(self, parts: tuple[Array, ...]):
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part).reshape(-1).view(np.uint8) for part in self.parts])


class Saved:
    """Pages on their way to the host: what the device does next to them changes nothing here."""

    def __init__(self, pages: list[PinnedPage]):
        self._pages = pages

    def payloads(self) -> list[PinnedPage]:
        """Waits until every page is there, in the order of the page ids."""
        jax.block_until_ready([page.parts for page in self._pages])
        return self._pages


class Transfers:
    """Reads pages out of the pools of a runner and writes them back in place, bit for bit.

    A page's payload is every array of it (`PagedKV.page_arrays`: K and V, codes, scales, bounds), of all layers, in
    pinned host memory of its own. The programs copy it there and back. Both directions run in the order of the steps
    around them: a page that a later step writes over was read before, one that a later step reads was written before.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._kinds = kinds_of(runner.state)
        self.page_bytes = sum(kind.page_bytes for kind in self._kinds)
        self._pinned = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        self._nothing = self.pin(np.zeros(self.page_bytes, np.uint8))

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
        pages: list[PinnedPage] = []
        for ids in _cut(page_ids):
            program = self._save_program(size := _bucket(len(ids)))
            self._runner.state, arrays = program(self._runner.state, _padded(ids, size))
            pages += map(PinnedPage, arrays[: len(ids)])
        return Saved(pages)

    def save(self, page_ids: Sequence[int]) -> list[PinnedPage]:
        """The payload of each page."""
        return self.begin_save(page_ids).payloads()

    def load(self, page_ids: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Writes payloads into pages, before any step that is dispatched later.

        Args:
            page_ids: distinct pages, as many as payloads; nobody else may read them yet.
        """
        pages = [self.pin(payload).parts for payload in payloads]
        for ids in _cut(page_ids):
            program = self._load_program(size := _bucket(len(ids)))
            now, pages = pages[: len(ids)], pages[len(ids) :]
            rest = (self._nothing.parts,) * (size - len(ids))
            self._runner.state = program(self._runner.state, _padded(ids, size), (*now, *rest))

    def pin(self, payload: Payload) -> PinnedPage:
        """A page whose bytes came from elsewhere, in pinned memory."""
        if isinstance(payload, PinnedPage):
            return payload
        parts, start = [], 0
        for kind in self._kinds:
            part = np.empty(kind.page_shape, kind.dtype)
            part.reshape(-1).view(np.uint8)[:] = payload[start : start + kind.page_bytes]
            parts.append(part)
            start += kind.page_bytes
        return PinnedPage(tuple(jax.device_put(parts, self._pinned)))

    def _save_program(self, size: int) -> jax.stages.Compiled:
        arguments = abstract(self._runner.state), jax.ShapeDtypeStruct((size,), jnp.int32)
        return self._runner.programs.get(("save", size), lambda: (save_pages(self._kinds, size), arguments))

    def _load_program(self, size: int) -> jax.stages.Compiled:
        ids, pages = jax.ShapeDtypeStruct((size,), jnp.int32), (abstract(self._nothing.parts),) * size
        arguments = abstract(self._runner.state), ids, pages
        return self._runner.programs.get(("load", size), lambda: (load_pages(self._kinds), arguments))


def kinds_of(state: DeviceState) -> tuple[Kind, ...]:
    """The kinds of arrays that a page consists of."""
    leaves: dict[tuple, list[int]] = {}
    for at, leaf in enumerate(jax.tree.leaves(state.kv.page_arrays())):
        leaves.setdefault((leaf.shape[1:], np.dtype(leaf.dtype)), []).append(at)
    return tuple(Kind(*kind, tuple(places)) for kind, places in leaves.items())


def save_pages(kinds: tuple[Kind, ...], size: int) -> Callable[..., tuple[DeviceState, tuple[Parts, ...]]]:
    """The program that copies `size` pages of a state to pinned host memory."""

    def save(state: DeviceState, ids: Int[Array, " S"]) -> tuple[DeviceState, tuple[Parts, ...]]:
        leaves = jax.tree.leaves(state.kv.page_arrays())
        batch = [jnp.stack([leaves[i][ids] for i in kind.leaves], 1) for kind in kinds]
        pages = tuple(tuple(arrays[at] for arrays in batch) for at in range(size))
        return state, jax.device_put(pages, jax.memory.Space.Host)

    return save


def load_pages(kinds: tuple[Kind, ...]) -> Callable[..., DeviceState]:
    """The program that writes pages in pinned host memory into a state."""

    def load(state: DeviceState, ids: Int[Array, " S"], pages: tuple[Parts, ...]) -> DeviceState:
        pages = jax.device_put(pages, jax.memory.Space.Device)
        leaves, tree = jax.tree.flatten(state.kv.page_arrays())
        for kind, *parts in zip(kinds, *pages, strict=True):
            values = jnp.stack(parts)
            for at, leaf in enumerate(kind.leaves):
                leaves[leaf] = leaves[leaf].at[ids].set(values[:, at])
        return replace(state, kv=state.kv.with_page_arrays(jax.tree.unflatten(tree, leaves)))

    return load


def _cut(page_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(page_ids), BUCKETS[-1]):
        yield page_ids[start : start + BUCKETS[-1]]


def _bucket(count: int) -> int:
    return next(size for size in BUCKETS if size >= count)


def _padded(ids: Sequence[int], size: int) -> np.ndarray:
    padded = np.zeros(size, np.int32)
    padded[: len(ids)] = ids
    return padded
