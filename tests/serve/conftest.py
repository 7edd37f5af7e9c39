"""One server with a tiny model for all tests of the HTTP API."""

from __future__ import annotations

import pytest

from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.serve.service import Service
from tests.engine.models import text_engine
from tests.serve.live import live


@pytest.fixture(scope="session")
def server():
    for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(name)
    service = Service(EngineConfig(page_size=16), load=lambda: AsyncEngine(engine=text_engine()))
    with live(service) as running:
        yield running
        running.settle()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def http(server):
    with server.http() as client:
        yield client
