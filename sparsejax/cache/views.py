"""One layer's pages as the decode rows of a step read them: dense, or coded beside a raw open page."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

import pallas_kernels
from pallas_kernels.deltakv import Weights
from pallas_kernels.deltakv_pools import DeltaPools
from sparsejax.cache.codecs.deltakv import DeltaPages

type Attended = Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float[Array, "B H"]]


class DensePages(NamedTuple):
    """Every page in the model's dtype."""

    k_pages: Float[Array, "N K P W"]
    v_pages: Float[Array, "N K P W"] | None
    scales = None

    def attention(self, q: Float[Array, "B H D"], *lists: Array, **options: Any) -> Attended:
        """Attention of one query per row over listed pages, as `paged_decode_attention`."""
        return pallas_kernels.paged_decode_attention(q, self.k_pages, self.v_pages, *lists, **options)


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
