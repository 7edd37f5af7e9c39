"""A page as a file keeps it: a header that says what it is and whose, a checksum over all of it, the bytes."""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Any

from sparsejax.errors import StoreError

try:
    from xxhash import xxh3_128_digest
except ModuleNotFoundError:
    xxh3_128_digest = None

MAGIC = b"sparseKV"
FORMAT = 1
_FIELDS = struct.Struct("<8sI16s32sQ")
CHECKSUM_BYTES = 16
HEADER_BYTES = _FIELDS.size + CHECKSUM_BYTES


def require_checksums() -> None:
    """Raises StoreError where the library that makes checksums is not installed."""
    if xxh3_128_digest is None:
        raise StoreError('a disk tier needs the package xxhash: pip install "sparsejax[disk]".')


def fingerprint_of(text: str) -> bytes:
    """16 bytes that stand for the model, the codec and the shape of pages that `text` describes."""
    return blake2b(text.encode(), digest_size=16).digest()


def header(hash: bytes, payload: bytes | memoryview, fingerprint: bytes) -> bytes:
    """What comes before `payload` in its record.

    Args:
        hash: 32 bytes, the page's name.
        fingerprint: 16 bytes, what the payload was made for.
    """
    fields = _FIELDS.pack(MAGIC, FORMAT, fingerprint, hash, len(payload))
    return fields + checksum(fields, payload)


def read(record: bytes, hash: bytes, fingerprint: bytes) -> memoryview:
    """The payload of a record, once everything about it is as expected.

    Raises:
        StoreError: it is cut short, damaged, of another format, page or model; the message says which.
    """
    if len(record) < HEADER_BYTES:
        raise StoreError(f"it has {len(record)} bytes, fewer than a header")
    fields, payload = record[: _FIELDS.size], memoryview(record)[HEADER_BYTES:]
    magic, version, owner, name, length = _FIELDS.unpack(fields)
    found = {
        "it is no page record": magic == MAGIC,
        f"it has format {version}, this program reads {FORMAT}": version == FORMAT,
        f"it promises {length} bytes and has {len(payload)}": length == len(payload),
        "its checksum does not match": record[_FIELDS.size : HEADER_BYTES] == checksum(fields, payload),
        "it was made by another model, codec or page shape": owner == fingerprint,
        "it holds another page": name == hash,
    }
    problem = next((text for text, good in found.items() if not good), None)
    if problem is not None:
        raise StoreError(problem)
    return payload


def checksum(*parts: Any) -> bytes:
    """16 bytes over buffers: XXH3, or XXH3 over theirs where they are several."""
    digests = [xxh3_128_digest(part) for part in parts]
    return digests[0] if len(digests) == 1 else xxh3_128_digest(b"".join(digests))
