"""`window_scores` on TPU: the kernels of prefill attention and of the mass that queries give."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.attention_mass.mosaic_tpu import attention_mass
from pallas_kernels.paged_prefill_attention.mosaic_tpu import paged_prefill_attention
from pallas_kernels.window_scores.passes import two_passes


def window_scores(
    q: Array, k_pages: Array, *lists: Array, sinks: Array | None = None, group: str = "mean", **options: object
) -> Array:
    """See `pallas_kernels.window_scores`."""
    return two_passes(paged_prefill_attention, attention_mass, q, k_pages, *lists, sinks=sinks, group=group, **options)
