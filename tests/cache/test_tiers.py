"""Main memory and disk as one store: bounded, in order of use, whole or missing, across restarts and kills."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from sparsejax.cache.tiers import disk as disk_module
from sparsejax.cache.tiers import record
from sparsejax.cache.tiers.disk import DiskTier
from sparsejax.cache.tiers.host import HostTier
from sparsejax.cache.tiers.store import TieredStore
from sparsejax.errors import StoreError

SIZE = 1000
RECORD = SIZE + record.HEADER_BYTES


def name(index: int) -> bytes:
    return blake2b(str(index).encode(), digest_size=32).digest()


def page(index: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, size, np.uint8)


def same(payload: np.ndarray | None, index: int, size: int = SIZE) -> bool:
    return payload is not None and np.array_equal(payload, page(index, size))


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_a_flipped_byte_anywhere_is_refused():
    fingerprint = record.fingerprint_of("model")
    good = record.header(name(1), page(1, 50).tobytes(), fingerprint) + page(1, 50).tobytes()
    assert bytes(record.read(good, name(1), fingerprint)) == page(1, 50).tobytes()
    for at in range(len(good)):
        for flip in (1, 128, 255):
            bad = bytearray(good)
            bad[at] ^= flip
            with pytest.raises(StoreError):
                record.read(bytes(bad), name(1), fingerprint)
    for cut in range(len(good)):
        with pytest.raises(StoreError):
            record.read(good[:cut], name(1), fingerprint)


def test_a_whole_record_of_something_else_is_refused():
    fingerprint = record.fingerprint_of("model")
    good = record.header(name(1), page(1).tobytes(), fingerprint) + page(1).tobytes()
    with pytest.raises(StoreError, match="another page"):
        record.read(good, name(2), fingerprint)
    with pytest.raises(StoreError, match="another model"):
        record.read(good, name(1), record.fingerprint_of("other"))
    with pytest.raises(StoreError, match="promises"):
        record.read(good + b"x", name(1), fingerprint)


def test_main_memory_keeps_what_was_used_last():
    host = HostTier(3 * SIZE + 10)
    assert [host.put(name(i), page(i)) for i in range(3)] == [[], [], []]
    assert same(host.get(name(0)), 0)
    host.put(name(1), page(1))  # again: used now
    (gone,) = host.put(name(3), page(3))
    assert gone[0] == name(2) and same(gone[1], 2)
    assert len(host) == 3 and host.bytes == 3 * SIZE
    (gone,) = host.put(name(9), page(9, 4 * SIZE))[-1:]
    assert gone[0] == name(9) and host.bytes <= host.max_bytes


def test_pages_go_down_to_the_disk_and_come_back(tmp_path):
    disk = DiskTier(tmp_path / "kv", 100 * RECORD, "m")
    store = TieredStore(4 * SIZE, disk)
    for i in range(12):
        store.put(name(i), page(i))
    store.flush()
    assert store.host_bytes == 4 * SIZE
    assert store.disk_bytes == 8 * RECORD == sum(map(os.path.getsize, files(disk.path)))
    assert store.contains([name(i) for i in range(20)]) == 12
    assert store.contains([name(50), name(0)]) == 0
    assert all(same(store.get(name(i)), i) for i in range(12))
    assert store.get(name(20)) is None
    store.flush()
    assert store.host_bytes <= 4 * SIZE and store.counters["disk_hits"] >= 8
    store.close()


def test_the_disk_is_bounded_and_keeps_what_was_used_last(tmp_path):
    disk = DiskTier(tmp_path, 5 * RECORD, "m")
    for i in range(5):
        assert disk.put(name(i), page(i))
    assert same(disk.get(name(0)), 0)
    assert disk.put(name(5), page(5)) and disk.put(name(6), page(6))
    assert [i for i in range(7) if name(i) in disk] == [0, 3, 4, 5, 6]
    assert disk.bytes == sum(map(os.path.getsize, files(tmp_path))) == 5 * RECORD
    assert not disk.put(name(8), page(8, 6 * RECORD)) and disk.bytes == 5 * RECORD


def test_a_restart_serves_what_the_last_process_left(tmp_path):
    store = TieredStore(4 * SIZE, DiskTier(tmp_path, 100 * RECORD, "m"))
    for i in range(10):
        store.put(name(i), page(i))
    store.close()
    for path in files(tmp_path)[:1]:  # what a killed process was writing
        path.with_suffix(disk_module.UNFINISHED).write_bytes(b"half")
    disk = DiskTier(tmp_path, 6 * RECORD, "m")
    store = TieredStore(0, disk)
    assert len(disk) == 6 and disk.bytes == 6 * RECORD and len(files(tmp_path)) == 6
    assert [i for i in range(10) if same(store.get(name(i)), i)] == [i for i in range(10) if name(i) in disk]
    store.close()
    other = DiskTier(tmp_path, 6 * RECORD, "another model")
    assert all(other.get(name(i)) is None for i in range(10)) and other.counters["damaged"] == 6


def test_damage_on_the_disk_is_a_miss_with_a_warning(tmp_path, caplog):
    disk = DiskTier(tmp_path, 100 * RECORD, "m")
    for i in range(6):
        disk.put(name(i), page(i))
    rng = random.Random(0)
    for i in range(5):
        file = next(file for file in files(tmp_path) if file.stem == name(i).hex())
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 + rng.randrange(255)
        file.write_bytes(data if i else b"")
    assert [disk.get(name(i)) is None for i in range(6)] == [True] * 5 + [False]
    assert disk.counters["damaged"] == 5 and len(files(tmp_path)) == 1 and disk.bytes == RECORD
    assert sum("is refused" in message for message in caplog.messages) == 5


@pytest.mark.parametrize("error", (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT))
def test_a_disk_that_refuses_is_a_miss_and_one_warning(tmp_path, caplog, monkeypatch, error):
    disk = DiskTier(tmp_path, 100 * RECORD, "m")
    disk.put(name(0), page(0))

    def fails(*_):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "replace", fails)
        store = TieredStore(SIZE, disk)
        for i in range(1, 6):
            store.put(name(i), page(i))
        store.flush()
        assert [i for i in range(5, -1, -1) if same(store.get(name(i)), i)] == [5, 0]
        store.flush()
    assert disk.counters["errors"] >= 4 and len(files(tmp_path)) == 1 and store.disk_bytes == RECORD
    assert len(caplog.messages) == 1 and os.strerror(error) in caplog.text
    assert disk.put(name(7), page(7)) and same(disk.get(name(7)), 7)  # as soon as there is room again


def test_a_disk_without_room_keeps_whole_records_only(tmp_path, caplog):
    """The system itself refuses: no file may grow beyond 500 bytes."""
    disk = DiskTier(tmp_path, 100 * RECORD, "m")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        assert not disk.put(name(1), page(1))
        assert disk.put(name(2), page(2, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk.get(name(1)) is None and same(disk.get(name(2)), 2, 100) and len(files(tmp_path)) == 1


def test_a_directory_that_cannot_be_made_is_a_warning(caplog):
    disk = DiskTier("/proc/self/kv", 100 * RECORD, "m")
    assert not disk.put(name(1), page(1)) and disk.get(name(1)) is None and len(caplog.messages) == 1


def test_what_is_no_directory_or_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="no directory"):
        DiskTier(tmp_path / "file", RECORD, "m")
    disk = DiskTier(tmp_path / "kv", RECORD, "m")
    with pytest.raises(StoreError, match="in use by another engine"):
        DiskTier(tmp_path / "kv", RECORD, "m")
    disk.close()
    DiskTier(tmp_path / "kv", RECORD, "m").close()


def test_pages_that_wait_to_be_written_are_bounded(tmp_path, monkeypatch):
    store = TieredStore(0, DiskTier(tmp_path, 100 * RECORD, "m"), write_buffer_bytes=2 * SIZE)
    go, write = threading.Event(), store.disk.put
    monkeypatch.setattr(store.disk, "put", lambda *page: go.wait() and write(*page))
    for i in range(5):
        store.put(name(i), page(i))
    assert store.host_bytes == 2 * SIZE and store.counters["dropped"] == 3
    assert same(store.get(name(0)), 0)
    go.set()
    store.flush()
    assert store.host_bytes == 0 and [i for i in range(5) if same(store.get(name(i)), i)] == [0, 1]
    store.close()


WRITER = """
import sys
from tests.cache.test_tiers import SIZE, DiskTier, RECORD, TieredStore, name, page
store = TieredStore(3 * SIZE, DiskTier(sys.argv[1], 40 * RECORD, "m"))
print("ready", flush=True)
start = int(sys.argv[2])
while True:
    for i in range(start, start + 200):
        store.put(name(i), page(i))
        store.get(name(start + (i * 7) % 60))
"""


def kill_while_writing(path: Path, runs: int, pause: float) -> int:
    """Kills a process that writes, `runs` times; every record left is whole. Returns how many records there were."""
    rng, root, seen = random.Random(1), Path(__file__).parents[2], 0
    for run in range(runs):
        command = [sys.executable, "-c", WRITER, str(path), str(run * 50)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        disk = DiskTier(path, 40 * RECORD, "m")
        assert disk.bytes <= disk.max_bytes and not [file for file in files(path) if file.suffix != disk_module.RECORD]
        for i in range(run * 50 + 200):
            payload = disk.get(name(i))
            assert payload is None or same(payload, i)
            seen += payload is not None
        assert not disk.counters["damaged"]
        disk.close()
    return seen


def test_a_killed_writer_leaves_whole_records(tmp_path):
    assert kill_while_writing(tmp_path, runs=2, pause=0.2) > 0


@pytest.mark.slow
def test_a_writer_killed_fifty_times_leaves_whole_records(tmp_path):
    assert kill_while_writing(tmp_path, runs=50, pause=0.2) > 500
