"""One layer's pages as the decode rows of a step read them: dense, or coded beside a raw open page."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

import pallas_kernels

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
        options["return_lse"] = True
        sealed = pallas_kernels.quantized_decode_attention(
            q,
            *self[:3],
            page_ids,
            jnp.maximum(counts - 1, 0),
            lengths,
            logical_ids=logical_ids,
            **options,
        )
        size = self.open_k.shape[2]
        held = jnp.where(lengths > 0, (lengths - 1) % size + 1, 0)
        ids = jnp.broadcast_to(self.own[:, None], counts.shape)[..., None]
        own = pallas_kernels.paged_decode_attention(
            q, self.open_k, self.open_v, ids, jnp.minimum(counts, 1), held, **options
        )
        out, lse = pallas_kernels.merge_partials(sealed, own)
        return (out, lse) if return_lse else out
