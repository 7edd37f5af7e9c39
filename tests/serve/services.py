"""Services over a tiny model and over the embedded one, for the tests of the servers."""

from __future__ import annotations

from typing import Any

from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.service import Service
from tests.engine.models import tiny_engine


def tiny_service(limits: ServiceLimits | None = None, tokenizer: Any = None, **overrides: Any) -> Service:
    """A service whose engine is tiny: random weights, token-id prompts unless a tokenizer is given."""
    return Service(
        EngineConfig(), limits, load=lambda: AsyncEngine(engine=tiny_engine(tokenizer=tokenizer, **overrides))
    )
