"""Reading safetensors without copying: headers are checked against their files, tensors are mapped views."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from sparsejax.errors import ModelError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as the file spells it, shape and byte range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """A checked header. ``open`` maps the data."""

    path: Path
    entries: dict[str, TensorEntry]
    data_offset: int

    def open(self) -> np.memmap:
        """The data section as read-only bytes; its memory is given back when the last view of it goes."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.data_offset)

    def view(self, data: np.ndarray, name: str) -> np.ndarray:
        """Tensor ``name`` as a view of ``data``."""
        entry = self.entries[name]
        return np.asarray(data[entry.start : entry.end]).view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_header(path: Path) -> SafetensorsFile:
    """Reads and checks a file's header. Raises ModelError if the file is truncated or is not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ModelError(
                    f"{path} is truncated or not a safetensors file ({size} bytes); download it again"
                )
            header = json.loads(file.read(length))
        entries = {name: _entry(found) for name, found in header.items() if name != "__metadata__"}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged safetensors header; download it again") from error
    _check_ranges(path, entries, size - 8 - length)
    return SafetensorsFile(path, entries, 8 + length)


def _entry(found: dict) -> TensorEntry:
    start, end = found["data_offsets"]
    return TensorEntry(str(found["dtype"]), tuple(int(n) for n in found["shape"]), int(start), int(end))


def _check_ranges(path: Path, entries: dict[str, TensorEntry], available: int) -> None:
    needed = max((entry.end for entry in entries.values()), default=0)
    if needed > available:
        lost = sorted(name for name, entry in entries.items() if entry.end > available)
        raise ModelError(
            f"{path} is truncated: {available} of {needed} data bytes are there, {len(lost)} tensors are cut "
            f"({', '.join(lost)}); download it again"
        )
    for name, entry in entries.items():
        known = DTYPES.get(entry.dtype)
        if known and entry.end - entry.start != math.prod(entry.shape) * known.itemsize:
            raise ModelError(f"{path} has a damaged header: tensor {name!r} has the wrong number of bytes")
