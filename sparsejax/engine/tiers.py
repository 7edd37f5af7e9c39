"""Pages that leave the device for main memory and disk, and come back when a prompt wants them."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sparsejax.cache.tiers.disk import DiskTier
from sparsejax.cache.tiers.host import Payload
from sparsejax.cache.tiers.record import HEADER_BYTES, checksum, require_checksums
from sparsejax.cache.tiers.store import TieredStore
from sparsejax.config import EngineConfig
from sparsejax.engine.costs import Costs
from sparsejax.engine.transfer import BUCKETS, Saved, Transfers
from sparsejax.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from sparsejax.engine.runner import Runner


logger = logging.getLogger(__name__)
MOST_SAVES = 8
"""Saves whose bytes are still on the device; the next one waits for the oldest."""


class PageTiers:
    """Joins the device's pages with a store of bytes. One thread moves bytes, so a page that was put can be got.

    Attributes:
        identity: text that pages of other processes must share to be taken up from the disk.
        counters: ``saved`` and ``loaded`` pages, and ``passed``: how often computing was faster.
    """

    def __init__(self, transfers: Transfers, store: TieredStore, identity: str = ""):
        self.transfers = transfers
        self.store = store
        self.identity = identity
        self.costs = Costs()
        self.counters: Counter[str] = Counter()
        self._saves: deque[tuple[Future, list[bytes]]] = deque()
        self._saving: set[bytes] = set()
        self._mover = ThreadPoolExecutor(1, "page-mover")

    def write_back(self, evicted: Sequence[tuple[bytes, int]]) -> None:
        """Keeps pages that are about to be written over on the device, by hash and page id."""
        self._settle(MOST_SAVES - 1)
        wanted = {hash: page for hash, page in evicted if not (hash in self._saving or self.store.touch(hash))}
        if not wanted:
            return
        saved = self.transfers.begin_save(list(wanted.values()))
        self.counters["saved"] += len(wanted)
        self._saving.update(wanted)
        self._saves.append((self._mover.submit(self._keep, list(wanted), saved), list(wanted)))

    def holds(self, hash: bytes) -> bool:
        """Whether a page is here or on its way."""
        return self._where(hash) is not None

    @property
    def num_pages(self) -> int:
        """Pages for which there is room."""
        disk = self.store.disk
        return (self.store.host.max_bytes + (disk.max_bytes if disk else 0)) // self.transfers.page_bytes

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Forgets pages that nobody will ask for again, those on their way here included."""
        if hashes:
            self._mover.submit(self.store.discard, tuple(hashes))

    def worthwhile(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages of `hashes` are here and sooner brought back than computed."""
        for count, hash in enumerate(hashes):
            source = self._where(hash)
            if source is None:
                return count
            if not self.costs.pays(source):
                self.counters["passed"] += 1
                return count
        return len(hashes)

    def fetch(self, hashes: Sequence[bytes]) -> Future[list[Payload]]:
        """Starts to read pages that are here; fewer come if one turns out to be damaged."""
        return self._mover.submit(self._read, tuple(hashes))

    def load(self, page_ids: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Writes fetched pages to the device, before any step that is dispatched later."""
        start = time.perf_counter()
        self.transfers.load(page_ids, payloads)
        self.costs.note("load", time.perf_counter() - start, len(page_ids))
        self.counters["loaded"] += len(page_ids)

    def close(self, cached: Sequence[tuple[bytes, int]]) -> None:
        """Leaves what there is, the pages `cached` on the device included, to the next process, if there is a disk."""
        try:
            for start in range(0, len(cached) if self.store.disk is not None else 0, BUCKETS[-1]):
                self.write_back(cached[start : start + BUCKETS[-1]])
            self._settle(0)
        except (RuntimeError, ValueError) as error:  # of JAX, from a device that has failed
            logger.warning("cached pages cannot be read from the device and are lost: %s", error)
        self._mover.shutdown()
        self.store.close()

    def memory(self) -> dict[str, int]:
        """Bytes of the pages in each tier."""
        parts = {"host_kv_pages": self.store.host_bytes}
        return parts if self.store.disk is None else {**parts, "disk_kv_pages": self.store.disk.bytes}

    def stats(self) -> dict[str, int | float]:
        """Pages that each tier holds, hits in pages, what went wrong, and what a page was measured to cost."""
        disk, counters = self.store.disk, self.store.counters
        stats = {
            **{f"kv_page_{name}_seconds": seconds for name, seconds in self.costs.seconds.copy().items()},
            "kv_pages_saved": self.counters["saved"],
            "kv_pages_loaded": self.counters["loaded"],
            "kv_pages_passed": self.counters["passed"],
            "host_kv_live_pages": len(self.store.host),
            "host_kv_live_bytes": self.store.host_bytes,
            "host_kv_hits": counters["host_hits"],
        }
        if disk is None:
            return stats
        return stats | {
            "disk_kv_live_pages": len(disk),
            "disk_kv_live_bytes": disk.bytes,
            "disk_kv_hits": counters["disk_hits"],
            "disk_kv_writes": disk.counters["writes"],
            "disk_kv_dropped": counters["dropped"],
            "disk_kv_errors": disk.counters["errors"],
            "disk_kv_damaged": disk.counters["damaged"],
        }

    def _where(self, hash: bytes) -> str | None:
        return "host" if hash in self._saving else self.store.where(hash)

    def _keep(self, hashes: list[bytes], saved: Saved) -> None:
        for hash, payload in zip(hashes, saved.payloads(), strict=True):
            self.store.put(hash, payload)

    def _read(self, hashes: Sequence[bytes]) -> list[Payload]:
        payloads = []
        for hash in hashes:
            source, start = self.store.where(hash), time.perf_counter()
            payload = self.store.get(hash)
            if payload is None:
                break
            self.costs.note(source or "host", time.perf_counter() - start, 1)
            payloads.append(payload)
        return payloads

    def _settle(self, most: int) -> None:
        """Forgets saves that are done, and waits until at most `most` are not."""
        while self._saves and (len(self._saves) > most or self._saves[0][0].done()):
            future, hashes = self._saves.popleft()
            future.result()
            self._saving.difference_update(hashes)


def make_tiers(config: EngineConfig, runner: Runner, settings: Any) -> PageTiers | None:
    """The tiers that `config` asks for, or None.

    Args:
        settings: all that decides what pages of given tokens hold, beside weights and programs; its text counts.

    Raises:
        ConfigError: the device has no pinned host memory.
        CapacityError: a budget holds not one page.
        StoreError: the directory cannot be used.
    """
    if not (config.host_kv_bytes or config.disk_kv_path):
        return None
    if "pinned_host" not in {memory.kind for memory in jax.local_devices()[0].addressable_memories()}:
        raise ConfigError(
            f"host_kv_bytes and disk_kv_path need pinned host memory, which JAX has not for {jax.default_backend()!r}: "
            "leave both out."
        )
    transfers = Transfers(runner)
    for name, size in (("host_kv_bytes", config.host_kv_bytes), ("disk_kv_bytes", config.disk_kv_bytes)):
        needed = transfers.page_bytes + (HEADER_BYTES if name == "disk_kv_bytes" else 0)
        if 0 < size < needed:
            raise CapacityError(f"{name}={size} holds no page of {needed} bytes: give at least that, or 0 for none.")
    if config.disk_kv_path is None:
        return PageTiers(transfers, TieredStore(config.host_kv_bytes))
    require_checksums()
    identity = _identity(runner.params, transfers, settings)
    disk = DiskTier(config.disk_kv_path, config.disk_kv_bytes, identity)
    return PageTiers(transfers, TieredStore(config.host_kv_bytes, disk, promote=transfers.pin), identity)


def _identity(params: Any, transfers: Transfers, settings: Any) -> str:
    """Stands for what pages hold, so that another process takes up those that it would compute itself and no others."""
    weights = blake2b(digest_size=32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        weights.update(repr(path).encode() + checksum(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)))
    programs = (version("sparsejax"), jax.__version__, jax.default_backend(), jax.local_devices()[0].device_kind)
    return repr((weights.hexdigest(), settings, transfers.description, programs))
