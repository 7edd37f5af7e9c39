"""One engine, six policies: any mix of requests gives each the tokens that it gets alone, and compiles nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.models.loaded import LoadedModel
from sparsejax.sparsity.policy import SparsityConfig
from tests.engine.models import random_prompts, tiny_engine, tiny_model

PROMPTS = random_prompts(6, (3, 40, 90, 150))
READ = {"budget": 64, "sink": 16, "recent": 16}
KEPT = {"budget": 40, "sink": 3, "recent": 12, "window": 12, "pool": 3, "interval": 17}
POLICIES = {
    "dense": None,
    "streaming": {"preset": "streaming", **KEPT},
    "strided": SparsityConfig(select="strided", stride=2, **READ),
    "quest": {"preset": "quest", **READ},
    "omnikv": SparsityConfig(select="omnikv", filter_layers=(0,), **READ),
    "snapkv": {"preset": "snapkv", **KEPT},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=0.8, seed=11)


def make_engine(codec: str, dtype: str, **settings):
    model = tiny_model()
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    model = LoadedModel(model.config, params, None, jnp.dtype(dtype))
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 40, **settings}
    return tiny_engine(model, sparsity=(codec, *filter(None, POLICIES.values())), **settings)


class Mixes:
    """Random requests that come while others run, each checked against what it gets alone."""

    def __init__(self, engine, kinds: tuple[SamplingParams, ...]):
        self.engine, self.kinds = engine, kinds
        self.alone = {
            (kind, name, place): self.finished(self.add("alone", kind, name, place))["alone"]
            for kind in range(len(kinds))
            for name in POLICIES
            for place in range(len(PROMPTS))
        }

    def add(self, request_id: str, kind: int, name: str, place: int, **changed) -> dict[str, list[int]]:
        params = dataclasses.replace(self.kinds[kind], sparsity=POLICIES[name], **changed)
        self.engine.add_request(request_id, PROMPTS[place], params)
        return {}

    def finished(self, found: dict[str, list[int]], steps: int = 1000) -> dict[str, list[int]]:
        """Tokens by request, once so many steps have run or nothing is left to do."""
        for _ in range(steps):
            if not self.engine.has_unfinished():
                break
            found |= {out.request_id: out.outputs[0].token_ids for out in self.engine.step() if out.finished}
        return found

    def run(self, seed: int) -> None:
        rng, wanted, found = np.random.default_rng(seed), {}, {}
        for index in range(rng.integers(2, 9)):
            key = (int(rng.integers(len(self.kinds))), list(POLICIES)[rng.integers(6)], int(rng.integers(len(PROMPTS))))
            count = int(rng.integers(1, 25))
            self.add(str(index), *key, max_tokens=count)
            wanted[str(index)] = self.alone[key][:count]
            self.finished(found, int(rng.integers(4)))
        assert self.finished(found) == wanted
        assert self.engine.stats()["kv_live_pages"] == 0


def test_a_few_mixes():
    with make_engine("int4", "float32") as engine:
        mixes, before = Mixes(engine, (GREEDY,)), engine.stats()["compiles"]
        for seed in range(12):
            mixes.run(seed)
        assert engine.stats()["compiles"] == before
        answers = {tuple(mixes.alone[0, name, 3]) for name in POLICIES}
        assert len(answers) == len(POLICIES), "policies must differ on a long prompt"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("codec", ["dense", "int4"])
def test_a_thousand_mixes_compile_nothing(codec, dtype):
    with make_engine(codec, dtype, warmup="full") as engine:
        mixes = Mixes(engine, (GREEDY, SEEDED))
        for seed in range(1000):
            mixes.run(seed)
        assert engine.stats()["compiles_after_warmup"] == 0
