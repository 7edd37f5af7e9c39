"""One layer's pages as the decode rows of a step read them: dense, or coded beside a raw open page."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

import pallas_kernels
from pallas_kernels.deltakv import Weights
from pallas_kernels.deltakv_pools import DeltaPools
from sparsejax.cache.codecs.deltakv import DeltaPages
from sparsejax.cache.codecs.quantized import Codes, QuantizedPages
from sparsejax.cache.segments import Segments

type Given = tuple[tuple[Int[Array, "B J"], Int[Array, "B 1"], Float[Array, "B K J P"]], ...]
"""Physical ids of pages, how many of them count, and the probability that queries gave to each of their tokens."""
type Attended = Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float[Array, "B H"]]


class DensePages(NamedTuple):
    """Every page in the model's dtype."""

    k_pages: Float[Array, "N K P W"]
    v_pages: Float[Array, "N K P W"] | None
    scales = None

    def attention(self, q: Float[Array, "B H D"], *lists: Array, **options: Any) -> Attended:
        """Attention of one query per row over listed pages, as `paged_decode_attention`."""
        return pallas_kernels.paged_decode_attention(q, self.k_pages, self.v_pages, *lists, **options)

    def given(
        self,
        q: Float[Array, "T H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        *starts: Int[Array, " B1"],
        **options: Any,
    ) -> Given:
        """What queries give to tokens: of one query per row, or of a ragged chunk whose `starts` are given."""
        lists = page_ids, counts, lengths
        attend = pallas_kernels.paged_prefill_attention if starts else pallas_kernels.paged_decode_attention
        _, lse = attend(q, *self, *lists, *starts, return_lse=True, **options)
        return ((page_ids[:, 0], counts, _mass(q, self.k_pages, *lists, lse, *starts, **options)),)


class CodedPages(NamedTuple):
    """Sealed pages in codes with their `scales`; row b's open page is page ``own[b]`` of the `open` pools."""

    k_pages: Shaped[Array, "N K Pc W"]
    v_pages: Shaped[Array, "N K Pc W"] | None
    scales: Float[Array, "N K X"]
    open_k: Float[Array, "R K P W"]
    open_v: Float[Array, "R K P W"] | None
    own: Int[Array, " B"]

    def attention(
        self,
        q: Float[Array, "B H D"],
        page_ids: Int[Array, "B Kl J"],
        counts: Int[Array, "B Kl"],
        lengths: Int[Array, " B"],
        *,
        logical_ids: Int[Array, "B Kl J"] | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Attended:
        """Attention of one query per row over listed pages, the row's open page last in each list that is not empty."""
        lists = (page_ids, jnp.maximum(counts - 1, 0), lengths)
        sealed = pallas_kernels.quantized_decode_attention(
            q, *self[:3], *lists, logical_ids=logical_ids, return_lse=True, **options
        )
        out, lse = _with_own_page(sealed, q, (self.open_k, self.open_v), self.own, counts, lengths, options)
        return (out, lse) if return_lse else out

    def given(
        self,
        q: Float[Array, "B H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        **options: Any,
    ) -> Given:
        """What one query per row gives to tokens of sealed pages, and to those of its own page."""
        _, lse = self.attention(q, page_ids, counts, lengths, return_lse=True, **options)
        sealed, own = jnp.maximum(counts - 1, 0), jnp.minimum(counts, 1)
        held = jnp.where(lengths > 0, (lengths - 1) % self.open_k.shape[2] + 1, 0)
        last = jnp.take_along_axis(page_ids[:, 0], sealed, axis=1)
        coded = _mass(q, self.k_pages, page_ids, sealed, lengths, lse, scales=self.scales, **options)
        raw = _mass(q, self.open_k, self.own[:, None, None], own, held, lse, **options)
        return (page_ids[:, 0], sealed, coded), (last, own, raw)

class LatentPages(NamedTuple):
    """Sealed pages as DeltaKV latents under one layer's compressor `weights`; `tables` lists all pages of each row, and
    row b's open page is page ``own[b]`` of the `open` pools."""

    sealed: DeltaPages
    pools: DeltaPools
    weights: Weights
    tables: Int[Array, "B S"]
    open_k: Float[Array, "R K P W"]
    open_v: Float[Array, "R K P W"]
    own: Int[Array, " B"]

    def attention(
        self,
        q: Float[Array, "B H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        **options: Any,
    ) -> Float[Array, "B H D"]:
        """Attention of one query per row over listed pages, the row's open page last in each list that is not empty."""
        lists = (page_ids, jnp.maximum(counts - 1, 0), lengths)
        sealed = self.sealed.decode_attention(q, self.pools, self.weights, self.tables, *lists, **options)
        options.pop("logical_ids", None)
        return _with_own_page(sealed, q, (self.open_k, self.open_v), self.own, counts, lengths, options)[0]


class CodedChunks(NamedTuple):
    """What the chunks of a step read: sealed pages in codes, and each token's own page out of a scratch pool."""

    sealed: QuantizedPages
    codes: Codes
    scratch_k: Float[Array, "S K P W"]
    scratch_v: Float[Array, "S K P W"] | None
    segments: Segments

    def attention(
        self,
        q: Float[Array, "T H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        starts: Int[Array, " B1"],
        **options: Any,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
        """Attention of a ragged chunk, and its log-sum-exp."""
        sealed = self.sealed.prefill_attention(q, self.codes, page_ids, counts, lengths, starts, **options)
        return _with_own_segments(sealed, q, (self.scratch_k, self.scratch_v), self.segments, options)

    def given(
        self,
        q: Float[Array, "T H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        starts: Int[Array, " B1"],
        **options: Any,
    ) -> Given:
        """What the queries of a chunk give to tokens: each segment is a row that lists the pages before its own."""
        _, lse = self.attention(q, page_ids, counts, lengths, starts, **options)
        cut, size = self.segments, self.scratch_k.shape[2]
        row = jnp.minimum(jnp.searchsorted(starts, cut.starts[:-1], side="right") - 1, len(lengths) - 1)
        first = lengths[row] - starts[row + 1] + cut.starts[:-1]  # where the segment begins in its row
        own = jnp.where(counts[row, 0] > 0, jnp.minimum(cut.lengths, 1), 0)[:, None]
        before = own * (first // size)[:, None]
        ends = own[:, 0] * (first // size * size + cut.lengths)
        codes, _, scales = self.sealed.view(self.codes)
        given = _mass(q, codes, page_ids[row], before, ends, lse, cut.starts, scales=scales, **options)
        ids, _, held, _ = cut.page_lists()
        raw = _mass(q, self.scratch_k, ids, own, held, lse, cut.starts, **options)
        return (page_ids[row, 0], before, given), (cut.pages[:, None], own, raw)


class LatentChunks(NamedTuple):
    """What the chunks of a step read under one layer's compressor: latents, and each token's own page."""

    sealed: DeltaPages
    pools: DeltaPools
    weights: Weights
    scratch_k: Float[Array, "S K P W"]
    scratch_v: Float[Array, "S K P W"]
    segments: Segments

    def attention(
        self,
        q: Float[Array, "T H D"],
        page_ids: Int[Array, "B 1 J"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        starts: Int[Array, " B1"],
        **options: Any,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
        """Attention of a ragged chunk, and its log-sum-exp."""
        lists = (page_ids[:, 0], lengths, starts)
        sealed = self.sealed.prefill_attention(q, self.pools, self.weights, *lists, **options)
        return _with_own_segments(sealed, q, (self.scratch_k, self.scratch_v), self.segments, options)


def _with_own_page(
    sealed: tuple[Array, Array],
    q: Float[Array, "B H D"],
    opened: tuple[Array, Array | None],
    own: Int[Array, " B"],
    counts: Int[Array, "B Kl"],
    lengths: Int[Array, " B"],
    options: dict[str, Any],
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """Attention over sealed pages put together with that over each row's open page, where its list is not empty."""
    held = jnp.where(lengths > 0, (lengths - 1) % opened[0].shape[2] + 1, 0)
    ids = jnp.broadcast_to(own[:, None], counts.shape)[..., None]
    raw = pallas_kernels.paged_decode_attention(
        q, *opened, ids, jnp.minimum(counts, 1), held, return_lse=True, **options
    )
    return pallas_kernels.merge_partials(sealed, raw)


def _with_own_segments(
    sealed: tuple[Array, Array],
    q: Float[Array, "T H D"],
    scratch: tuple[Array, Array | None],
    segments: Segments,
    options: dict[str, Any],
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attention of chunks over sealed pages put together with that of each token over its own page."""
    lists = segments.page_lists()
    own = pallas_kernels.paged_prefill_attention(q, *scratch, *lists, return_lse=True, **options)
    return pallas_kernels.merge_partials(sealed, own)


def _mass(q: Array, k_pages: Array, *lists: Array, implementation: Any, **options: Any) -> Float[Array, "B K J P"]:
    """`attention_mass` by token, by whichever implementation serves it."""
    return pallas_kernels.attention_mass(q, k_pages, *lists, per_token=True, **options)
