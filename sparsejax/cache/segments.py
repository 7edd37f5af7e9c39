"""Prefill chunks cut at page borders: each segment is what a chunk adds to one page of one row."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The segments of the chunks of R rows, in their order; their pages lie in a scratch pool meanwhile.

    Segment i has page i + 1 of the scratch pool; page 0 absorbs padding.

    Attributes:
        scratch: scratch page of each token.
        starts: segment i has the tokens ``starts[i] : starts[i + 1]`` of the chunk section; unused ones have none.
        lengths: tokens that its page holds after the chunk, those of earlier chunks included; 0 where unused.
        pages: page that it will be sealed into.
        first, last: scratch pages of each row's first and last segment, 0 where it has none.
    """

    scratch: Int[Array, " T"]
    starts: Int[Array, " S1"]
    lengths: Int[Array, " S"]
    pages: Int[Array, " S"]
    first: Int[Array, " R"]
    last: Int[Array, " R"]

    @classmethod
    def of(
        cls, page_ids: Int[Array, " T"], offsets: Int[Array, " T"], query_starts: Int[Array, " R1"], page_size: int
    ) -> Segments:
        """Cuts the chunk section whose token t goes to slot ``offsets[t]`` of page ``page_ids[t]``."""
        tokens, rows = page_ids.shape[0], query_starts.shape[0] - 1
        # A row of n tokens touches at most n / P + 2 - 2 / P pages, and never more than n.
        most = min(tokens, tokens // page_size + 2 * rows)
        index = jnp.arange(tokens, dtype=jnp.int32)
        live = index < query_starts[-1]
        begins = (offsets == 0) | (index == query_starts[:-1, None]).any(0)
        number = jnp.cumsum(begins & live, dtype=jnp.int32)
        scratch = jnp.where(live, number, 0)
        starts = jnp.searchsorted(jnp.where(live, number, most + 1), jnp.arange(1, most + 2, dtype=jnp.int32))
        starts = starts.astype(jnp.int32)
        final = jnp.maximum(starts[1:] - 1, 0)
        used = starts[1:] > starts[:-1]
        owns = query_starts[1:] > query_starts[:-1]
        return cls(
            scratch,
            starts,
            jnp.where(used, offsets[final] + 1, 0),
            jnp.where(used, page_ids[final], 0),
            jnp.where(owns, scratch[jnp.minimum(query_starts[:-1], tokens - 1)], 0),
            jnp.where(owns, scratch[jnp.maximum(query_starts[1:] - 1, 0)], 0),
        )

    def rows_and_pages(
        self, lengths: Int[Array, " R"], query_starts: Int[Array, " R1"], page_size: int
    ) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
        """Of each segment that has tokens: its row, and which of the row's pages it belongs to."""
        row = jnp.searchsorted(query_starts, self.starts[:-1], side="right").astype(jnp.int32) - 1
        row = jnp.clip(row, 0, len(lengths) - 1)
        slot = lengths[row] - query_starts[row + 1] + self.starts[:-1]
        return row, slot // page_size

    @property
    def scratch_pages(self) -> Int[Array, " S"]:
        """Scratch page of each segment."""
        return jnp.arange(1, len(self.lengths) + 1, dtype=jnp.int32)

    def page_lists(self) -> tuple[Int[Array, "S 1 1"], Int[Array, "S 1"], Int[Array, " S"], Int[Array, " S1"]]:
        """Each segment as a row that lists its own scratch page: ids, counts, lengths and query starts."""
        ids = self.scratch_pages[:, None, None]
        return ids, (self.lengths > 0).astype(jnp.int32)[:, None], self.lengths, self.starts
