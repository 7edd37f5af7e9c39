"""SnapKV (Li et al., arXiv 2404.14469): tokens that the last queries of the prompt attend to."""

from __future__ import annotations

from sparsejax.sparsity.keep.observed import window_attention as scores

__all__ = ["scores"]
