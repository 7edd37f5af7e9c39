"""`kv_write`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, dispatch


def kv_write(
    k_pages: Float[Array, "N K P W"],
    v_pages: Float[Array, "N K P W"] | None,
    k_new: Float[Array, "T K D"],
    v_new: Float[Array, "T K D"],
    page_ids: Int32[Array, " T"],
    offsets: Int32[Array, " T"],
    *,
    implementation: Implementation = None,
) -> tuple[Float[Array, "N K P W"], Float[Array, "N K P W"] | None]:
    """Stores token t at slot `offsets[t]` of page `page_ids[t]`, for every KV head; returns the new pools.

    Call it under `jax.jit` with the pools donated: they are then updated in place. Values are cast to the
    dtype of the pools. Page 0 absorbs padding tokens: several of them may name one slot of it, and which one
    stays there is not defined. Every other (page, offset) must be named once at most. Ids outside the pool
    are a caller's error.

    Pools may have any shape of `pallas_kernels.layouts`: W is D, or wider; `v_pages` None means that
    `k_pages` holds K in [..., :D] and V in [..., D:2D], and the result is then (k_pages, None).

    Raises ValueError or TypeError for shapes or dtypes that do not fit together.
    """
    checks.shape_of("k_new", k_new, (None, None, None), "T K D")
    _, kv_heads, _, head_dim = checks.pools(k_pages, v_pages, k_new.shape[2])
    checks.shape_of("k_new", k_new, (None, kv_heads, head_dim), "T K D")
    checks.shape_of("v_new", v_new, tuple(k_new.shape), "T K D")
    for name, array in (("page_ids", page_ids), ("offsets", offsets)):
        checks.shape_of(name, array, (k_new.shape[0],), "T")
        checks.int32(name, array)
    return dispatch("kv_write", implementation, k_pages, v_pages, k_new, v_new, page_ids, offsets)
