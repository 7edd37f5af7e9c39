"""Pages to bytes and back: bit for bit, in place, in the order of the steps, with nothing compiled later."""

from __future__ import annotations

from threading import current_thread

import jax
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.engine.transfer import BUCKETS, Transfers
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, tiny_model

CASES = ("dense", "int8", "fp8", "int4", {"preset": "quest", "budget": 64})


def page_arrays(engine) -> list[np.ndarray]:
    return [np.array(a).view(np.uint8) for a in jax.tree.leaves(engine.core.runner.state.kv.page_arrays())]


@pytest.mark.parametrize("sparsity", CASES, ids=str)
def test_pages_come_back_bit_for_bit_wherever_they_are_put(sparsity):
    with tiny_engine(sparsity=sparsity) as engine:
        engine.generate(random_prompts(1, (200, 90, 310)), SamplingParams(max_tokens=3, temperature=0.0))
        transfers, before = Transfers(engine.core.runner), page_arrays(engine)
        rng = np.random.default_rng(0)
        for count in (1, 2, 4, 5, 16, 21):
            source, target = rng.permutation(np.arange(1, 45))[: 2 * count].reshape(2, -1).tolist()
            payloads = transfers.save(source)
            assert all(payload.nbytes == len(np.asarray(payload)) == transfers.page_bytes for payload in payloads)
            transfers.load(target, payloads)
            after = page_arrays(engine)
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(new[target], old[source])
                others = np.setdiff1d(np.arange(1, len(old)), target)
                np.testing.assert_array_equal(new[others], old[others])
            before = after
        assert any(array[1:40].any() for array in before)


def test_a_page_is_read_as_it_was_when_the_save_began():
    with tiny_engine() as engine:
        engine.generate(random_prompts(1, (100,)), SamplingParams(max_tokens=2, temperature=0.0))
        transfers = Transfers(engine.core.runner)
        pages = [1, 2, 3]
        expected = transfers.save(pages)
        saved = transfers.begin_save(pages)
        transfers.load(pages, [np.full(transfers.page_bytes, 7, np.uint8)] * 3)
        for one, other in zip(saved.payloads(), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert all((np.asarray(payload) == 7).all() for payload in transfers.save(pages))


@pytest.mark.parametrize("sparsity", ("dense", "int4"))
def test_transfers_update_the_state_in_place_and_compile_nothing_once_warm(sparsity):
    with tiny_engine(tiny_model(positions=4096), sparsity=sparsity) as engine:
        programs, transfers = engine.core.runner.programs, Transfers(engine.core.runner)
        transfers.warm()
        assert len(programs) == programs.num_compiles == 2 * len(BUCKETS)
        for count in (1, 3, 17):
            transfers.load(list(range(1, count + 1)), transfers.save(list(range(20, 20 + count))))
        assert programs.num_compiles == 2 * len(BUCKETS)
        assert_in_place(engine)


def test_pages_lie_in_pinned_memory_and_no_step_waits_for_their_bytes(monkeypatch):
    """Of a working set four times the pool: who waits for copies is the thread that keeps them."""
    prompts = random_prompts(3, tuple(range(150, 158)))
    params = SamplingParams(max_tokens=2, temperature=0.0)
    waited, wait = [], jax.block_until_ready
    settings = dict(max_num_seqs=2, enable_prefix_caching=True, host_kv_bytes=1 << 30)
    with tiny_engine(kv_memory_bytes=21 * 8192, **settings) as engine:
        monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(current_thread().name) or wait(tree))
        for prompt in prompts * 2:
            engine.generate(prompt, params)
        tiers = engine.core.tiers
        tiers.fetch([]).result()
        pages = list(tiers.store.host._pages.values())
        assert all(part.sharding.memory_kind == "pinned_host" for page in pages for part in page.parts)
        held = sum(part.nbytes for page in pages for part in page.parts)
        assert held == engine.memory()["host_kv_pages"] == len(pages) * tiers.transfers.page_bytes > 40 * 8192
        assert tiers.counters["loaded"] > 0
    assert waited and all(name.startswith("page-mover") for name in waited)


def test_a_payload_has_the_bytes_of_a_page_and_says_of_what():
    with tiny_engine() as dense, tiny_engine(sparsity="int8") as coded:
        one, other = Transfers(dense.core.runner), Transfers(coded.core.runner)
        assert one.page_bytes == dense.core.runner.state.kv.group.page_bytes
        assert other.page_bytes == coded.core.runner.state.kv.group.page_bytes
        assert one.description != other.description
