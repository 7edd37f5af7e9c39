"""`window_scores` on Hopper GPUs: the kernels of prefill attention and of the mass that queries give."""

from __future__ import annotations

import jax

from pallas_kernels.attention_mass.mosaic_gpu import attention_mass
from pallas_kernels.paged_prefill_attention.mosaic_gpu import paged_prefill_attention
from pallas_kernels.window_scores.passes import two_passes


def window_scores(
    q: jax.Array,
    k_pages: jax.Array,
    *lists: jax.Array,
    sinks: jax.Array | None = None,
    group: str = "mean",
    **options: object,
) -> jax.Array:
    """See `pallas_kernels.window_scores`."""
    return two_passes(paged_prefill_attention, attention_mass, q, k_pages, *lists, sinks=sinks, group=group, **options)
