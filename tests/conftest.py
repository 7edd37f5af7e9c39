"""Settings for every test, made before JAX is imported: CPU, no network, a compile cache in the checkout.

Most of the time goes to compiling, so machine code is made without optimisation (a third less in all). An `XLA_FLAGS`
of one's own wins; the long sweeps run with an empty one, that is with the code that users run.
"""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def machine_key() -> str:
    """Differs between kinds of processors: programs compiled for one may not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [os.uname().machine]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
CACHE = str(ROOT / ".cache" / "jax" / machine_key())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def pytest_configure() -> None:
    """Array annotations are checked; engines keep compiled programs in the checkout, not in the home."""
    from jaxtyping import install_import_hook

    from tests.typecheck import PACKAGES

    install_import_hook(list(PACKAGES), "tests.typecheck.arrays_only")
    import sparsejax.config

    sparsejax.config.DEFAULT_COMPILE_CACHE = CACHE


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops what earlier files compiled before the process runs out of memory mappings, where the loader crashes."""
    yield
    import jax

    from sparsejax.engine.mappings import mappings

    if (found := mappings()) and found[0] > found[1] / 4:
        jax.clear_caches()
        gc.collect()
