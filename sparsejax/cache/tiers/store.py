"""Host and disk as one store of pages: put a page, ask for it by its hash, get it or a miss."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile

from sparsejax.cache.tiers.disk import DiskTier
from sparsejax.cache.tiers.host import HostTier, Payload

WRITE_BUFFER_BYTES = 256 << 20
"""Pages that wait to be written take at most this much memory; more are dropped, which is a miss later."""


class TieredStore:
    """Pages go to main memory first; those that it has no room for are written to the disk by a thread of its own.

    A page read from the disk goes back to main memory and stays on the disk. Safe for several threads.

    Attributes:
        counters: ``host_hits``, ``disk_hits``, ``misses`` and ``dropped`` pages.
    """

    def __init__(
        self,
        host_bytes: int,
        disk: DiskTier | None = None,
        *,
        write_buffer_bytes: int = WRITE_BUFFER_BYTES,
        promote: Callable[[Payload], Payload] = lambda payload: payload,
    ):
        """`promote` makes of a page from the disk one as main memory has them."""
        self._promote = promote
        self.host = HostTier(host_bytes)
        self.disk = disk
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Payload] = {}
        self._waiting_bytes = 0
        self._most_waiting = write_buffer_bytes
        self._writes: deque[Future] = deque()
        self._writer = ThreadPoolExecutor(1, "page-writer")

    @property
    def host_bytes(self) -> int:
        """Main memory in use, pages that wait to be written included."""
        return self.host.bytes + self._waiting_bytes

    @property
    def disk_bytes(self) -> int:
        return 0 if self.disk is None else self.disk.bytes

    def put(self, hash: bytes, payload: Payload) -> None:
        """Takes a page in; the store owns `payload` from now, and nobody may change it."""
        with self._lock:
            gone = self.host.put(hash, payload)
        for one in gone:
            self._spill(*one)

    def get(self, hash: bytes) -> Payload | None:
        """The page, or None. The disk is read on the caller's thread."""
        with self._lock:
            payload = self.host.get(hash)
            if payload is None:
                payload = self._waiting.get(hash)
        if payload is not None:
            self.counters["host_hits"] += 1
        elif self.disk is not None and (payload := self.disk.get(hash)) is not None:
            self.counters["disk_hits"] += 1
            payload = self._promote(payload)
            self.put(hash, payload)
        else:
            self.counters["misses"] += 1
        return payload

    def where(self, hash: bytes) -> str | None:
        """``"host"`` or ``"disk"``, from which a page would come, or None; it may still turn out to be damaged."""
        with self._lock:
            if hash in self.host or hash in self._waiting:
                return "host"
        return "disk" if self.disk is not None and hash in self.disk else None

    def touch(self, hash: bytes) -> bool:
        """Whether main memory has a page, which counts as used now."""
        with self._lock:
            return self.host.get(hash) is not None or hash in self._waiting

    def contains(self, hashes: Iterable[bytes]) -> int:
        """How many of `hashes`, from the first on, are here."""
        return sum(1 for _ in takewhile(self.where, hashes))

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Forgets pages that nobody will ask for again."""
        with self._lock:
            for hash in hashes:
                self.host.discard(hash)
            if self.disk is not None:  # behind what waits to be written
                self._writes.extend(self._writer.submit(self.disk.discard, hash) for hash in hashes)

    def flush(self) -> None:
        """Waits until every page that had to leave main memory is written."""
        with self._lock:
            writes = list(self._writes)
        for write in writes:
            write.result()

    def close(self) -> None:
        """Writes what main memory holds to the disk, for the next process. Nothing may be asked for later."""
        self.flush()
        self._writer.shutdown()
        if self.disk is not None:
            for hash, payload in self.host.clear():
                self.disk.put(hash, payload)
            self.disk.close()

    def _spill(self, hash: bytes, payload: Payload) -> None:
        if self.disk is None:
            return
        with self._lock:
            while self._writes and self._writes[0].done():
                self._writes.popleft().result()  # raises what went wrong there beyond a failing disk
            if self._waiting_bytes + payload.nbytes > self._most_waiting:
                self.counters["dropped"] += 1
                return
            if hash in self._waiting:
                return
            self._waiting[hash] = payload
            self._waiting_bytes += payload.nbytes
            self._writes.append(self._writer.submit(self._write, hash, payload))

    def _write(self, hash: bytes, payload: Payload) -> None:
        try:
            self.disk.put(hash, payload)
        finally:
            with self._lock:
                del self._waiting[hash]
                self._waiting_bytes -= payload.nbytes
