"""Contender: sparsejax itself, in its own process like every peer."""

from __future__ import annotations

from typing import Any

from contender import Requests, Serve, main

engine: Any = None


def load(settings: dict) -> tuple[Serve, dict]:
    global engine
    import jax
    import numpy as np

    import sparsejax
    from sparsejax import Engine, SamplingParams

    # The same requests come again in every repetition, and each is to be computed.
    engine = Engine(settings["model"], dtype=settings["dtype"], enable_prefix_caching=False, **settings["engine"])

    def serve(requests: Requests) -> list:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
            for _, new in requests
        ]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    versions = {"sparsejax": sparsejax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return serve, {"versions": versions, "settings": settings["engine"]}


def counters() -> dict[str, int]:
    return {"compiles": engine.stats()["compiles"]}


if __name__ == "__main__":
    main(load, counters)
