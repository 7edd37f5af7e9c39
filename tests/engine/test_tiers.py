"""Pages that went through main memory or the disk serve as if they had never left: same tokens, same bits."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import jax
import pytest

from sparsejax import EngineConfig, SamplingParams
from sparsejax.errors import CapacityError, ConfigError, StoreError
from tests.cache.test_latent import stored_as
from tests.engine.models import random_prompts, tiny_engine
from tests.engine.test_prefix import bits

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
PAGE = 16
# Room for two sequences of 10 pages; a working set of 8 such prompts is 4 times the pool.
COLD = dict(max_num_seqs=2, max_num_batched_tokens=64, enable_prefix_caching=False)
POOL = COLD | dict(enable_prefix_caching=True)


def pool_bytes(pages: int = 21, **overrides) -> int:
    with tiny_engine(**POOL, **overrides) as engine:
        group = engine.core.runner.state.kv.group
        return group.fixed_bytes + pages * group.page_bytes


def answers(engine, prompts: list[list[int]], salt: str | None = None) -> list:
    """Tokens and log-probabilities, one prompt after the other: so the programs are the same whatever is cached."""
    params = dataclasses.replace(GREEDY, cache_salt=salt)
    outputs = [engine.generate([prompt], params)[0] for prompt in prompts]
    return list(map(bits, outputs))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(3, tuple(range(150, 158)))


CODED = tuple(pytest.param(codec, marks=pytest.mark.slow) for codec in ("int8", "fp8", "int4", "deltakv"))


@pytest.fixture(scope="module", params=("dense", *CODED))
def setting(request, prompts, tmp_path_factory):
    """Sparsity, bytes of a pool, and what a large engine without a cache answers."""
    sparsity = stored_as(request.param, tmp_path_factory)
    with tiny_engine(sparsity=sparsity, **COLD) as engine:
        return sparsity, pool_bytes(sparsity=sparsity), answers(engine, prompts)


def test_a_working_set_four_times_the_pool_is_served_from_below(setting, prompts, tmp_path, monkeypatch):
    sparsity, size, cold = setting
    page = size // 21
    tiers = dict(host_kv_bytes=30 * page, disk_kv_path=str(tmp_path), disk_kv_bytes=200 * page)
    with tiny_engine(sparsity=sparsity, kv_memory_bytes=size, **tiers, **POOL) as engine:
        assert answers(engine, prompts) == cold
        before = engine.stats()
        monkeypatch.setattr(engine.core.tiers, "worthwhile", len)  # whatever the clock says
        for _ in range(2):
            assert answers(engine, prompts) == cold
        after = engine.stats()
        assert after["prefix_cache_hits"] - before["prefix_cache_hits"] > 0.5 * 2 * sum(map(len, prompts))
        assert after["host_kv_hits"] and after["disk_kv_hits"] and after["kv_pages_loaded"] > 60
        memory = engine.memory()
        assert 0 < memory["host_kv_pages"] <= 30 * page + 8 * page
        assert memory["disk_kv_pages"] == sum(f.stat().st_size for f in tmp_path.rglob("*.page")) <= 200 * page
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_a_restarted_engine_serves_what_the_last_one_computed(setting, prompts, tmp_path):
    sparsity, size, cold = setting
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=20 * size)
    with tiny_engine(sparsity=sparsity, **tiers, **POOL) as engine:
        assert answers(engine, prompts) == cold
    with tiny_engine(sparsity=sparsity, **tiers, **POOL) as engine:
        assert answers(engine, prompts) == cold
        stats = engine.stats()
        assert stats["prefix_cache_hits"] == sum((len(prompt) - 1) // PAGE * PAGE for prompt in prompts)
        assert stats["computed_tokens"] < sum(map(len, prompts)) / 2


def test_any_split_of_the_prompt_continues_from_below(setting, prompts, tmp_path, monkeypatch):
    """After a restart, each tenant where its own last prompt ended; one who had none finds nothing."""
    sparsity, _, cold = setting
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30)
    cuts = (PAGE - 1, PAGE, PAGE + 1, 71, 144, 149)
    with tiny_engine(sparsity=sparsity, **tiers, **POOL) as engine:
        for cut in cuts:
            answers(engine, [prompts[0][:cut]], salt=str(cut))
    with tiny_engine(sparsity=sparsity, **tiers, **POOL) as engine:
        monkeypatch.setattr(engine.core.tiers, "worthwhile", len)  # whatever the clock says
        for cut in (0, *cuts):
            before = engine.stats()["kv_pages_loaded"]
            assert answers(engine, prompts[:1], salt=str(cut)) == cold[:1], cut
            assert engine.stats()["kv_pages_loaded"] - before == cut // PAGE


def test_damage_and_a_full_disk_cost_time_and_no_token(prompts, tmp_path, caplog, monkeypatch):
    with tiny_engine(**COLD) as engine:
        cold = answers(engine, prompts)
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30)
    with tiny_engine(**tiers, **POOL) as engine:
        answers(engine, prompts)
    rng = random.Random(0)
    for file in sorted(tmp_path.rglob("*.page")):
        if rng.random() < 0.3:
            data = bytearray(file.read_bytes())
            data[rng.randrange(len(data))] ^= 1 + rng.randrange(255)
            file.write_bytes(data)
    monkeypatch.setattr(Path, "mkdir", refusing(tmp_path, Path.mkdir))
    with tiny_engine(kv_memory_bytes=pool_bytes(), **tiers, **POOL) as engine:
        monkeypatch.setattr(engine.core.tiers, "worthwhile", len)
        assert answers(engine, prompts) == cold
        stats = engine.stats()
        assert stats["disk_kv_damaged"] > 3 and stats["disk_kv_errors"] > 0 and stats["disk_kv_writes"] == 0
    assert any("refused" in message for message in caplog.messages)


def refusing(folder: Path, mkdir):
    """`Path.mkdir` where the disk that has `folder` is full."""

    def refuse(path: Path, *args: object, **options: object) -> None:
        if folder in path.parents:
            raise OSError(28, "No space left on device")
        mkdir(path, *args, **options)

    return refuse


def test_preempted_sequences_go_on_beside_main_memory(prompts, monkeypatch):
    with tiny_engine(**COLD) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        cold = [o.outputs[0].token_ids for o in engine.generate(prompts[:2], params)]
    with tiny_engine(kv_memory_bytes=pool_bytes(26), host_kv_bytes=1 << 30, **POOL) as engine:
        monkeypatch.setattr(engine.core.tiers, "worthwhile", len)  # whatever the clock says
        assert [o.outputs[0].token_ids for o in engine.generate(prompts[:2], params)] == cold
        stats = engine.stats()
        assert stats["num_preemptions"] > 0
        # Prompts are read once: what was preempted came back from where it was written to.
        assert stats["kv_pages_saved"] >= stats["kv_pages_loaded"] == stats["host_kv_hits"] > 0
        assert stats["computed_tokens"] < sum(map(len, prompts[:2])) + 2 * (60 + PAGE)


def test_aborts_while_pages_are_on_their_way_leave_nothing_behind(setting, prompts, tmp_path, monkeypatch):
    sparsity, size, cold = setting
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30, host_kv_bytes=size // 2)
    rng = random.Random(5)
    with tiny_engine(sparsity=sparsity, kv_memory_bytes=size, **tiers, **POOL) as engine:
        monkeypatch.setattr(engine.core.tiers, "worthwhile", len)
        for turn in range(30):
            for index in rng.sample(range(8), 3):
                n = rng.choice([1, 1, 2])
                engine.add_request(f"{turn}.{index}", prompts[index], SamplingParams(max_tokens=3, n=n, seed=turn))
            for _ in range(rng.randint(0, 6)):
                engine.step()
            engine.abort([name for name in engine.core.request_ids() if rng.random() < 0.6])
        while engine.has_unfinished():
            engine.step()
        assert answers(engine, prompts) == cold
        stats = engine.stats()
        assert stats["kv_live_pages"] == 0 and stats["kv_pages_loaded"] > 20
        assert engine.core.scheduler.prefixes._coming == {}


@pytest.mark.parametrize("codec", ("dense", pytest.param("int8", marks=pytest.mark.slow)))
def test_what_an_eviction_left_outlives_a_restart(prompts, tmp_path, codec):
    policy = {"preset": "keydiff", "budget": 48, "sink": 3, "recent": 12}
    asked = [{"prompt_token_ids": [*prompts[0], number], "compress_at": 150} for number in range(2)]
    params = dataclasses.replace(GREEDY, sparsity=policy)

    def serve(engine) -> tuple[list, list[int]]:
        outputs = [engine.generate(prompt, params)[0] for prompt in asked]
        return [bits(output) for output in outputs], [output.num_cached_tokens for output in outputs]

    with tiny_engine(sparsity=[codec, policy], **COLD) as engine:
        cold, _ = serve(engine)
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30, sparsity=[codec, policy])
    with tiny_engine(**tiers, **POOL) as engine:
        assert serve(engine) == (cold, [0, 150])
    with tiny_engine(**tiers, **POOL) as engine:
        assert serve(engine) == (cold, [150, 150])
        assert engine.stats()["kv_pages_loaded"] == 48 // PAGE and engine.stats()["computed_tokens"] < 2 * PAGE


def test_another_salt_or_model_finds_nothing_below(prompts, tmp_path):
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30)
    salted = SamplingParams(temperature=0.0, max_tokens=2, cache_salt="one")
    with tiny_engine(**tiers, **POOL) as engine:
        engine.generate(prompts, salted)
    with tiny_engine(**tiers, **POOL) as engine:
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2, cache_salt="two"))
        assert engine.stats()["kv_pages_loaded"] == 0
    with tiny_engine(sparsity="int8", **tiers, **POOL) as engine:
        engine.generate(prompts, salted)
        assert engine.stats()["kv_pages_loaded"] == 0


def test_settings_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="needs both"):
        EngineConfig(disk_kv_path=str(tmp_path))
    with pytest.raises(ConfigError, match="needs both"):
        EngineConfig(disk_kv_bytes=1 << 20)
    with pytest.raises(ConfigError, match="at least 0"):
        EngineConfig(host_kv_bytes=-1)
    with pytest.raises(ConfigError, match="as text"):
        EngineConfig(disk_kv_path=tmp_path, disk_kv_bytes=1 << 20)
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        EngineConfig(host_kv_bytes=1 << 20, enable_prefix_caching=False)
    with pytest.raises(CapacityError, match="holds no page"):
        tiny_engine(host_kv_bytes=100, **POOL)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="no directory"):
        tiny_engine(disk_kv_path=str(tmp_path / "file"), disk_kv_bytes=1 << 20, **POOL)


@pytest.mark.parametrize("in_flight", (False, True))
def test_an_engine_whose_device_failed_shuts_down_and_leaves_what_is_below(prompts, tmp_path, caplog, in_flight):
    tiers = dict(disk_kv_path=str(tmp_path), disk_kv_bytes=1 << 30, host_kv_bytes=1 << 30)
    engine = tiny_engine(kv_memory_bytes=pool_bytes(), **tiers, **POOL)
    answers(engine, prompts[:4])
    saved = engine.stats()["kv_pages_saved"]
    if in_flight:
        engine.add_request("lost", prompts[5], GREEDY)
        engine.step()
        for array in jax.tree.leaves(engine.core._in_flight.outputs):
            array.delete()
    for array in jax.tree.leaves(engine.core.runner.state):
        array.delete()
    engine.shutdown()
    engine.shutdown()
    assert any("are lost" in message for message in caplog.messages)
    assert any("last step failed" in message for message in caplog.messages) == in_flight
    assert len(list(tmp_path.rglob("*.page"))) >= saved > 0
    with tiny_engine(**tiers, **POOL) as engine:
        answers(engine, prompts[:4])
        assert engine.stats()["kv_pages_loaded"] > 0
