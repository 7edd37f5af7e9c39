"""Pages of many programs on their way through VMEM: what the Mosaic TPU kernels over page lists share.

Work is a flat list of programs. A program is one block of query rows of one sequence together with one page
list: all KV heads when the heads share a list (a page is then one copy of [K, P, D]), one KV head when each
has its own. Programs run in order on a core, and what the next one needs is always on its way while this one
computes:

* page ids live in HBM and come to scalar memory in chunks of 128, one chunk ahead of the page copies;
* page blocks are double buffered in VMEM, one block ahead of the arithmetic, across program borders.

A block whose tokens are all visible to all query rows of its program is given out as such, so that it needs no masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import coded

IDS = 128  # page ids per chunk in scalar memory
FAR = 1 << 30  # position of what is not listed
# words of the state kept in scalar memory between programs
_PRIMED, _BUFFER, _CHUNK, _OWNER = 0, 1, 2, 3  # _OWNER + buffer: the id chunk that buffer was filled from


@dataclass(frozen=True)
class Spec:
    """What is static in a kernel: shapes, options, block sizes."""

    page: int  # P, tokens of a page
    pages: int  # pages of a block
    heads: int  # KV heads of a program
    per_head: bool  # each KV head has its own list
    logical: bool  # lists carry logical ids (otherwise entry j is page j of the sequence)
    scale: float
    window: int | None
    soft_cap: float | None
    dtype: jnp.dtype  # of the products' operands
    codec: str | None = None  # pools hold codes, the last pool their scales
    own_page: bool = True  # queries see the page of their position up to it, else only the pages before that one

    @property
    def width(self) -> int:
        return self.page * self.pages


@dataclass(frozen=True)
class Work:
    """Per program, int32 [R]: entries [start, stop) of list `row`, query positions first..last.

    R = items * lists per item."""

    row: jax.Array
    start: jax.Array
    stop: jax.Array
    first: jax.Array
    last: jax.Array


@dataclass(frozen=True)
class Stream:
    """References and numbers of a running program `me`, of those before `end` on its core.

    `row, start, stop, first, last` are `Work` in scalar memory, `ids_hbm` the lists as `chunked_ids` makes them.
    `head_of(r)` is the KV head of program r where each has its own list.
    """

    spec: Spec
    row: Any
    start: Any
    stop: Any
    first: Any
    last: Any
    ids_hbm: Any
    pools: tuple[Any, ...]
    buffers: tuple[Any, ...]
    ids: Any
    state: Any
    ids_sem: Any
    page_sem: Any
    me: jax.Array
    end: jax.Array
    head_of: Callable[[jax.Array], jax.Array]

    def has_work(self, r):
        return self.stop[r] > self.start[r]

    def next_program(self, r):
        """The next program with work, or `end`."""
        return lax.while_loop(
            lambda x: jnp.logical_and(x < self.end, jnp.logical_not(self.has_work(jnp.minimum(x, self.end - 1)))),
            lambda x: x + 1,
            r + 1,
        )

    def chunk_copy(self, r, chunk, slot):
        return pltpu.make_async_copy(self.ids_hbm.at[self.row[r], chunk], self.ids.at[slot], self.ids_sem.at[slot])

    def page_copies(self, r, word: Callable[[int], Any], buffer, j):
        """Copies of entry j of a block; `word(i)` is what row i of the lists says of it."""
        page_id = word(0)
        for pool, buf in zip(self.pools, self.buffers, strict=True):
            source, target = pool.at[page_id], buf.at[buffer, :, j]
            if buf.ndim == 4:  # scales: of all heads, as those of one are no whole tile
                target = buf.at[buffer, j]
            elif self.spec.per_head:
                source, target = pool.at[page_id, self.head_of(r)], buf.at[buffer, 0, j]
            yield pltpu.make_async_copy(source, target, self.page_sem.at[buffer])

    def block_copies(self, r, block, buffer):
        """Copies of what a block needs beside its pages."""
        return ()

    def place_of(self, token):
        """(page in the block, offset in that page) of the tokens of a block, in the order of the operands."""
        return coded.place_of(token, self.spec.page, self.spec.pages, self.spec.codec)

    def entries(self, r, block):
        """Listed entries of the block, relative to its first."""
        n = self.spec.pages
        return jnp.maximum(self.start[r] - block * n, 0), jnp.minimum(self.stop[r] - block * n, n)

    def fetch(self, r, block, buffer):
        """Start the copies of a block; on entering an id chunk, wait for it and start the one after."""
        n, state = self.spec.pages, self.state
        at = lax.rem(block * n, IDS)

        @pl.when(jnp.logical_or(at == 0, block == lax.div(self.start[r], n)))
        def _():
            slot = lax.rem(state[_CHUNK] + 1, 3)
            state[_CHUNK] = slot
            chunk = lax.div(block * n, IDS)
            self.chunk_copy(r, chunk, slot).wait()
            ahead = lax.rem(slot + 1, 3)
            more = (chunk + 1) * IDS < self.stop[r]

            @pl.when(more)
            def _():
                self.chunk_copy(r, chunk + 1, ahead).start()

            @pl.when(jnp.logical_not(more))
            def _():
                following = self.next_program(r)

                @pl.when(following < self.end)
                def _():
                    self.chunk_copy(following, lax.div(self.start[following], IDS), ahead).start()

        slot = state[_CHUNK]
        state[_OWNER + buffer] = slot
        low, high = self.entries(r, block)
        for copy in self.block_copies(r, block, buffer):
            copy.start()

        @pl.loop(low, high)
        def _(j):
            for copy in self.page_copies(r, lambda i: self.ids[slot, i, at + j], buffer, j):
                copy.start()

    def fetch_after(self, r, block, buffer):
        """Starts the copies of what comes after a block, in this program or a later one."""
        n = self.spec.pages
        inside = block + 1 < lax.div(self.stop[r] + n - 1, n)

        @pl.when(inside)
        def _():
            self.fetch(r, block + 1, buffer)

        @pl.when(jnp.logical_not(inside))
        def _():
            following = self.next_program(r)

            @pl.when(following < self.end)
            def _():
                self.fetch(following, lax.div(self.start[following], n), buffer)

    def logical_id(self, block, buffer, j):
        """Logical id of entry j of a block."""
        return self.ids[self.state[_OWNER + buffer], 1, lax.rem(block * self.spec.pages, IDS) + j]

    def positions(self, block, buffer, shape, dim):
        """Position of each of the block's tokens, which lie along `dim`; FAR for entries that are not listed."""
        spec = self.spec
        n, P = spec.pages, spec.page
        low, high = self.entries(self.me, block)
        entry, offset = self.place_of(lax.broadcasted_iota(jnp.int32, shape, dim))
        far = jnp.int32(FAR)
        if not spec.logical:
            here = jnp.logical_and(entry >= low, entry < high)
            return jnp.where(here, block * spec.width + entry * P + offset, far)
        place = jnp.full(shape, far)
        for j in range(n):
            listed = jnp.logical_and(j >= low, j < high)
            base = jnp.where(listed, self.logical_id(block, buffer, j) * P, far)
            place = jnp.where(entry == j, base + offset, place)
        return place

    def newest(self, query):
        """The last position that queries at positions `query` see."""
        return query if self.spec.own_page else lax.div(query, self.spec.page) * self.spec.page - 1

    def sees(self, place, query):
        """Whether queries at positions `query` see tokens at `place`."""
        seen = place <= self.newest(query)
        if self.spec.window is not None:
            seen = jnp.logical_and(seen, place > query - self.spec.window)
        return seen

    def run(self, step, consume: Callable[[Any, Any, bool], None]) -> None:
        """Calls `consume(block, buffer, masked)` for the program's blocks, which are then in buffer `buffer`.

        `masked` is False where every query row sees every token. `step` counts the programs of this core.
        """
        n, P, me, state = self.spec.pages, self.spec.page, self.me, self.state

        @pl.when(step == 0)
        def _():
            state[_PRIMED] = 0

        @pl.when(jnp.logical_and(self.has_work(me), state[_PRIMED] == 0))
        def _():
            state[_PRIMED] = 1
            state[_BUFFER] = 0
            state[_CHUNK] = 2
            self.chunk_copy(me, lax.div(self.start[me], IDS), 0).start()
            self.fetch(me, lax.div(self.start[me], n), 0)

        @pl.when(self.has_work(me))
        def _():
            @pl.loop(lax.div(self.start[me], n), lax.div(self.stop[me] + n - 1, n))
            def _(block):
                buffer = state[_BUFFER]
                self.fetch_after(me, block, 1 - buffer)
                low, high = self.entries(me, block)
                for copy in self.block_copies(me, block, buffer):
                    copy.wait()

                @pl.loop(low, high)
                def _(j):
                    for copy in self.page_copies(me, lambda i: 0, buffer, j):
                        copy.wait()

                lowest, highest = block * n + low, block * n + high - 1
                if self.spec.logical:
                    lowest, highest = (self.logical_id(block, buffer, j) for j in (low, high - 1))
                plain = jnp.logical_and(high - low == n, highest * P + P - 1 <= self.newest(self.first[me]))
                if self.spec.window is not None:
                    plain = jnp.logical_and(plain, lowest * P > self.last[me] - self.spec.window)
                pl.when(plain)(lambda: consume(block, buffer, False))
                pl.when(jnp.logical_not(plain))(lambda: consume(block, buffer, True))
                state[_BUFFER] = 1 - buffer


def scratch(ids: jax.Array) -> list[Any]:
    """`ids`, `state` and the semaphores of a `Stream`."""
    return [
        pltpu.SMEM((3, *ids.shape[2:]), jnp.int32),
        pltpu.SMEM((8,), jnp.int32),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def page_buffers(pool: jax.Array, spec: Spec) -> Any:
    """Two blocks of pages of a pool [N, K, Pc, M]."""
    return pltpu.VMEM((2, spec.heads, spec.pages, *pool.shape[2:]), pool.dtype)


def scale_buffers(scales: jax.Array, spec: Spec) -> Any:
    """Two blocks of the scales [N, K, X] of pages."""
    return pltpu.VMEM((2, spec.pages, *scales.shape[1:]), scales.dtype)


def scores(q: jax.Array, k: jax.Array, spec: Spec) -> jax.Array:
    """Scores [h, m, t] of queries [h, m, d] with keys [h, t, d]."""
    precision = lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None
    s = jnp.einsum("hmd,htd->hmt", q, k, precision=precision, preferred_element_type=jnp.float32) * spec.scale
    return s if spec.soft_cap is None else spec.soft_cap * jnp.tanh(s / spec.soft_cap)


def heads_at_once(heads: int, rows: int) -> int:
    """KV heads of a program, of so many query rows each, that are computed together."""
    return max(h for h in range(1, heads + 1) if heads % h == 0 and (h == 1 or h * rows <= 64))


def block_pages(heads: int, page: int, lanes: int, itemsize: int, listed: int, most: int) -> int:
    """Pages of a block: about 1 MiB of K and V per buffer, between 128 and `most` tokens, a power of two."""
    tokens = 128
    while tokens < most and 2 * heads * tokens * 2 * lanes * itemsize <= 1 << 20:
        tokens *= 2
    while tokens > 128 and tokens >= 2 * page * listed:
        tokens //= 2
    return max(1, min(tokens // page, IDS))


def chunked_ids(page_ids: jax.Array, logical_ids: jax.Array | None, *more: jax.Array) -> jax.Array:
    """[B, Kl, J] -> [B * Kl, chunks, X, IDS]: physical ids, logical ids if there are, and more numbers of the entries,
    as the kernel streams them."""
    lists = [page_ids] if logical_ids is None else [page_ids, jnp.broadcast_to(logical_ids, page_ids.shape)]
    lists += more
    J = page_ids.shape[-1]
    chunks = pl.cdiv(J, IDS)
    lists = [
        jnp.pad(x.reshape(-1, J), ((0, 0), (0, chunks * IDS - J))).reshape(-1, chunks, 1, IDS) for x in lists
    ]
    return jnp.concatenate(lists, axis=2).astype(jnp.int32)
