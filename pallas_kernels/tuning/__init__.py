"""Configurations measured per device by `scripts/tune.py`; without them the heuristics of the kernels serve.

`<device>.json` holds a list of entries: the op, what its pools store, head dim, page size, how many (row, KV head)
pairs a call had, how many tokens their lists could hold, the configuration that was fastest, and its seconds beside
those of the heuristic's. A call takes the entry nearest to it in the last two, if that is near.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent
NEAR = 2.0  # doublings


def device_kind() -> str:
    """The kind of the device that is traced for: the described one, else the first one of the default platform."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.local_devices()[0].device_kind if described is None else described.device_kind


def path(kind: str, folder: Path | None = None) -> Path:
    """Where the entries of a device kind are."""
    return (folder or FOLDER) / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


@functools.cache
def entries(file: Path) -> tuple[dict[str, Any], ...]:
    """The entries of one file; none if there is no such file."""
    return tuple(json.loads(file.read_text())) if file.exists() else ()


def lookup(
    op: str, stored: Any, head_dim: int, page: int, pairs: int, tokens: int, kind: str | None = None
) -> dict[str, int] | None:
    """Fields of the configuration measured nearest to a call, None where none is near."""
    best, least = None, NEAR
    for entry in entries(path(kind or device_kind())):
        if (entry["op"], entry["stored"], entry["head_dim"], entry["page"]) != (op, str(stored), head_dim, page):
            continue
        far = abs(math.log2(entry["pairs"] / pairs)) + abs(math.log2(entry["tokens"] / tokens))
        if far <= least:
            best, least = entry["config"], far
    return best
