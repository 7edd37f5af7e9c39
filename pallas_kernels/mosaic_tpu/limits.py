"""What a kernel may take of a chip, and what it can copy."""

from __future__ import annotations

from pallas_kernels.dispatch import Declined
from pallas_kernels.layouts import LANES

# Bytes of VMEM. The chips have 128 MiB, v5p 64; what XLA keeps there between operations needs the rest.
VMEM = 48 << 20


def require(condition: bool, reason: str) -> None:
    """Declines unless the condition holds."""
    if not condition:
        raise Declined(reason)


def whole_lanes(name: str, minor: int, hint: str = "") -> None:
    """Declines pools whose minor dimension XLA would lay out anew around every call."""
    require(minor % LANES == 0, f"the minor dimension of {name} must be a multiple of {LANES}; got {minor}{hint}")


def whole_pages(name: str, kv_heads: int) -> None:
    """Declines pools [N, K, X] whose pages do not lie together: XLA puts other K outside of N."""
    fits = kv_heads % 8 == 0 or kv_heads in (1, 2, 4)
    require(fits, f"pages of {name} lie together where K is 1, 2, 4 or a multiple of 8; got {kv_heads}")
