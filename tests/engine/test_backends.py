"""Every backend that a config may name reaches the operations."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import dispatch, explain
from sparsejax.config import BACKENDS
from sparsejax.engine.build import IMPLEMENTATIONS


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_serves_every_operation_in_the_end(backend: str):
    implementation = IMPLEMENTATIONS[backend]
    assert dispatch.candidates(implementation)
    pool, new = np.zeros((3, 1, 16, 64), np.float32), np.zeros((2, 1, 64), np.float32)
    at = np.zeros(2, np.int32)
    chosen, _ = explain("kv_write", pool, pool, new, new, at, at, implementation=implementation)
    assert chosen == ("reference" if backend == "reference" else "xla")
