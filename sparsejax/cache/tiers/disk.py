"""The cold tier: one file per page, named by its hash, under a budget of bytes; whatever goes wrong is a miss.

A record is written under another name and then renamed, so a killed process leaves whole records or none. Nothing is
forced to the disk: what a power failure tears, the checksum finds.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import weakref
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np

from sparsejax.cache.tiers import record
from sparsejax.cache.tiers.host import Payload
from sparsejax.errors import StoreError

logger = logging.getLogger(__name__)
RECORD, UNFINISHED = ".page", ".part"
_NAME = re.compile(r"[0-9a-f]{64}\.page")


class DiskTier:
    """Pages by hash, the one used last longest ago goes first. Safe for several threads, for one process only.

    Attributes:
        bytes: of all records, headers included; never more than ``max_bytes``.
        counters: ``writes``, ``errors`` (reads and writes that failed) and ``damaged`` (records that were refused).
    """

    def __init__(self, path: str | Path, max_bytes: int, description: str):
        """Opens a directory, with the records that an earlier process left there.

        Args:
            description: of the model, the codec and the shape of pages; records of others are refused.

        Raises:
            StoreError: the path is a file, another process uses it, or checksums cannot be made. A disk that cannot be
                written is a warning only.
        """
        record.require_checksums()
        self.path = Path(path).expanduser()
        self.max_bytes = max_bytes
        self.bytes = 0
        self.counters: Counter[str] = Counter()
        self._fingerprint = record.fingerprint_of(description)
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()
        self._failing = False
        self._unlock = None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._unlock = weakref.finalize(self, os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._scan()
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(f"disk_kv_path={str(path)!r} is no directory: give one, or a path to be made.") from error
        except BlockingIOError as error:
            self.close()
            raise StoreError(
                f"disk_kv_path={str(path)!r} is in use by another engine: give each engine a directory of its own."
            ) from error
        except OSError as error:
            self._note_failure("opened", error)

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, hash: bytes) -> bool:
        return hash in self._sizes

    def put(self, hash: bytes, payload: Payload) -> bool:
        """Writes a page, if it fits and the disk lets it; others go for it. Returns whether it is there now."""
        if self._touch(hash):
            return True
        size = record.HEADER_BYTES + payload.nbytes
        if size > self.max_bytes:
            return False
        target = self._file(hash)
        unfinished = target.with_suffix(UNFINISHED)
        try:
            self._make_room(size)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            with open(unfinished, "wb") as file:
                data = memoryview(np.asarray(payload))
                file.write(record.header(hash, data, self._fingerprint))
                file.write(data)
            os.replace(unfinished, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            self._note_failure("written", error)
            return False
        with self._lock:
            self._sizes[hash] = size
            self.bytes += size
            self._failing = False
        self.counters["writes"] += 1
        return True

    def get(self, hash: bytes) -> Payload | None:
        """The page, if it is there and whole; what is damaged is deleted."""
        if not self._touch(hash):
            return None
        target = self._file(hash)
        try:
            data = target.read_bytes()
        except OSError as error:
            self._drop(hash)
            if not isinstance(error, FileNotFoundError):  # it made room for another one meanwhile
                self._note_failure("read", error)
            return None
        try:
            payload = record.read(data, hash, self._fingerprint)
        except StoreError as error:
            self.counters["damaged"] += 1
            logger.warning("page record %s is refused and deleted: %s", target, error)
            self._drop(hash)
            return None
        with contextlib.suppress(OSError):
            os.utime(target)  # the order of use outlives the process
        return np.frombuffer(payload, np.uint8)

    def discard(self, hash: bytes) -> None:
        """Deletes a page, if it is there."""
        if hash in self._sizes:
            self._drop(hash)

    def close(self) -> None:
        """Lets another process use the directory."""
        if self._unlock is not None:
            self._unlock()

    def _file(self, hash: bytes) -> Path:
        name = hash.hex()
        return self.path / name[:2] / (name + RECORD)

    def _scan(self) -> None:
        found = []
        for folder in self.path.iterdir():
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.suffix == UNFINISHED:
                    file.unlink()
                elif _NAME.fullmatch(file.name):
                    status = file.stat()
                    found.append((status.st_mtime_ns, bytes.fromhex(file.stem), status.st_size))
        for _, hash, size in sorted(found):
            self._sizes[hash] = size
            self.bytes += size
        self._make_room(0)

    def _touch(self, hash: bytes) -> bool:
        with self._lock:
            if hash in self._sizes:
                self._sizes.move_to_end(hash)
                return True
            return False

    def _make_room(self, size: int) -> None:
        with self._lock:
            while self.bytes + size > self.max_bytes:
                self._unlink(next(iter(self._sizes)))

    def _drop(self, hash: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._unlink(hash)

    def _unlink(self, hash: bytes) -> None:
        self.bytes -= self._sizes.pop(hash, 0)
        self._file(hash).unlink(missing_ok=True)

    def _note_failure(self, what: str, error: OSError) -> None:
        """Counts a failure; of a row of them the first is told."""
        self.counters["errors"] += 1
        if not self._failing:
            self._failing = True
            logger.warning("pages cannot be %s on %s (%s): served without them", what, self.path, error.strerror)
