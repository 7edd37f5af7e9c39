"""Compiled programs by key: compiled ahead of time, kept for good, counted."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax

from sparsejax.errors import StoreError


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

    def get(self, key: Hashable, build: Callable[[], tuple[Callable, tuple]]) -> jax.stages.Compiled:
        """The program `key`; `build` gives its function and example arguments. The first one is donated."""
        program = self._compiled.get(key)
        if program is None:
            start = time.perf_counter()
            function, arguments = build()
            program = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
            self._compiled[key] = program
            self.num_compiles += 1
            self.compile_seconds += time.perf_counter() - start
        return program

    def __len__(self) -> int:
        return len(self._compiled)

    def items(self):
        return self._compiled.items()


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of `tree`, which is all that compiling needs."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


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
