"""What a kernel may take of a chip."""

from __future__ import annotations

# Bytes of VMEM. The chips have 128 MiB, v5p 64; what XLA keeps there between operations needs the rest.
VMEM = 48 << 20
