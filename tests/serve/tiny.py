"""A service over a tiny model without a tokenizer, for tests that stop the service they use."""

from __future__ import annotations

from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.serve.service import Service
from tests.engine.models import tiny_engine


def tiny_service() -> Service:
    return Service(EngineConfig(), load=lambda: AsyncEngine(engine=tiny_engine()))
