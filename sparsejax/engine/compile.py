"""Compiled programs by key: compiled ahead of time, kept for good, counted."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from sparsejax.engine.mappings import check_mappings
from sparsejax.errors import StoreError

Build = Callable[[], tuple[Callable, tuple]]
"""Gives a program's function and its example arguments, of which the first is donated."""


class Programs:
    """A finite table of compiled programs. `num_warm` of its compiles were done before the first request.

    A program is compiled when it is first asked for, by `warm` or by use, from the shapes of example
    arguments. Calling one with other shapes is an error, so nothing is ever compiled behind the engine's back.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self.num_compiles = 0
        self.num_warm = 0
        self.compile_seconds = 0.0

    def get(self, key: Hashable, build: Build) -> jax.stages.Compiled:
        """The program `key`, compiled in this thread if it is missing.

        Raises:
            CapacityError: on CPU, the process has no room for another program (`mappings`).
        """
        if key not in self._compiled:
            start = time.perf_counter()
            self._keep(key, _lower(build).compile())
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key]

    def get_all(self, builds: Mapping[Hashable, Build], progress: Callable[[list], Iterable] = list) -> None:
        """Compiles the programs that are missing, as many at once as there are processors.

        Args:
            progress: is given the missing keys and iterated over as they are done.
        """
        start = time.perf_counter()
        missing = {key: build for key, build in builds.items() if key not in self._compiled}
        pool = ThreadPoolExecutor(os.cpu_count())  # the compiler does not hold the interpreter's lock, tracing does
        try:
            pending = {key: pool.submit(_lower(build).compile) for key, build in missing.items()}
            for key in progress(list(pending)):
                self._keep(key, pending[key].result())
        finally:
            pool.shutdown(cancel_futures=True)
        self.compile_seconds += time.perf_counter() - start

    def _keep(self, key: Hashable, program: jax.stages.Compiled) -> None:
        self._compiled[key] = program
        self.num_compiles += 1

    def __len__(self) -> int:
        return len(self._compiled)

    def items(self):
        return self._compiled.items()


def _lower(build: Build) -> jax.stages.Lowered:
    if jax.default_backend() == "cpu":
        check_mappings()
    function, arguments = build()
    return jax.jit(function, donate_argnums=0).lower(*arguments)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of `tree`, which is all that compiling needs; of arrays outside device memory also where."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, "sharding", None)
        elsewhere = place if place is not None and place.memory_kind == "pinned_host" else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=elsewhere)

    return jax.tree.map(of, tree)


def release_compiler_memory() -> None:
    """Gives the heap that compiling left behind back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def use_compile_cache(directory: Path | None) -> None:
    """Makes compiled programs persist in `directory`, every one of them however quick to compile.

    Raises:
        StoreError: the directory cannot be created or written.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"compile_cache_dir={str(directory)!r} cannot be written ({error.strerror}): give a directory that "
            'you may write, or compile_cache_dir="" to compile anew at every start.'
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
