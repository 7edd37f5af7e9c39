"""`window_scores` in plain jnp."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.attention_mass.reference import attention_mass
from pallas_kernels.paged_prefill_attention.reference import paged_prefill_attention
from pallas_kernels.window_scores.passes import two_passes


def window_scores(
    q: Array, k_pages: Array, *lists: Array, sinks: Array | None = None, group: str = "mean", **options: object
) -> Array:
    """See `pallas_kernels.window_scores`."""
    keys = k_pages[..., : q.shape[3]]
    return two_passes(paged_prefill_attention, attention_mass, q, keys, *lists, sinks=sinks, group=group, **options)
