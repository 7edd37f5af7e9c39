"""Eviction from coded pages: what is scored and moved, and the same tokens however a request is served."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codes
from sparsejax import SamplingParams
from sparsejax.cache.coded import CodedKV
from sparsejax.cache.group import make_group
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.evictor import Evictor
from sparsejax.sparsity.policy import PRESETS
from tests.cache.sealed_reference import SealedReference, read
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, tiny_model
from tests.sparsity import keep_oracle as oracle
from tests.sparsity.keep_cases import DIM, LAYERS, METHODS, ROW, ROWS, P, evict, model, rows_with

CODECS = ("int8", "fp8", "int4")


class CodedCut:
    """A row of random tokens in coded pages, cut by one keep. Pages that are not its own decode to NaN."""

    def __init__(self, codec: str, keep: Keep, length: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.keep, self.length, self.codec = keep, length, codec
        self.eviction, config = keep.eviction(length), model(4, 2)
        group = make_group(config, P, np.dtype("float32"), 24, codec=codec, num_rows=ROWS - 1)
        self.layout = layout = group.layout
        pages = -(-length // P)
        ids = rng.permutation(np.arange(1, 24))
        self.table = jnp.full(12, 23, jnp.int32).at[:pages].set(ids[:pages])
        self.evictor = Evictor.of(tuple(dataclasses.replace(keep, method=name) for name in METHODS), config, P, length)
        self.new = jnp.zeros(self.evictor.capacity, jnp.int32)
        (kept,) = self.eviction.kept
        self.new = self.new.at[: -(-kept // P)].set(ids[pages : pages - -kept // P])
        pools = tuple(self._filled(rng) for _ in range(LAYERS))
        nothing = (None,) * LAYERS
        observed = tuple(self.evictor.nothing_seen(ROWS, layout) for _ in pools)
        rows = rows_with(keep, self.eviction, METHODS.index(keep.method))
        self.queries = rng.normal(size=(LAYERS, keep.window, 4, DIM)).astype(np.float32)
        if self.evictor.num_observed:
            observed = tuple(
                dataclasses.replace(seen, queries=seen.queries.at[ROW, : keep.window].set(q))
                for seen, q in zip(observed, self.queries, strict=True)
            )
        self.kv = CodedKV(pools, nothing, nothing, observed, group, config.windows)
        pages = self.table[None], jnp.array([length]), jnp.array([kept]), jnp.int32(length), self.new[None]
        self.after = evict(self.evictor, self.kv, rows, jnp.int32(ROW), *pages)
        self.theta = config.rope.theta

    def _filled(self, rng):
        layout, full = self.layout, self.length // P
        nan = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), layout.open.zeros())
        k, v = jnp.asarray(rng.normal(size=(2, 12, 2, P, DIM)), jnp.float32)
        codes_, _ = layout.zeros()
        sealed = (*codes_[:-1], jnp.full_like(codes_[-1], jnp.nan))
        every = jnp.arange(12, dtype=jnp.int32)
        sealed = layout.sealed.seal(sealed, (k, v), every, self.table, jnp.int32(full))
        own = jnp.array([ROW + 1]) if self.length % P else jnp.array([0])
        return sealed, layout.open.take(nan, (k, v), jnp.array([full]), own)

    def tokens(self, kv: CodedKV, layer: int, pages, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [K, length, D] as attention reads them."""
        (sealed, opened), table = kv.pools[layer], np.asarray(pages)[: -(-length // P)]
        decoded = codes.decode_pages(*self.layout.sealed.view(sealed), DIM)
        found = []
        for pool, raw in zip(decoded, opened, strict=True):
            pool = np.asarray(pool)[table].swapaxes(0, 1).reshape(2, -1, DIM)[:, :length].copy()
            pool[:, length // P * P :] = np.asarray(raw)[ROW + 1, :, : length % P]
            found.append(pool)
        return tuple(found)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "method,length,budget",
    [("keydiff", 150, 50), ("snapkv", 96, 52), ("expected_attention", 161, 64), ("rkv", 61, 49)],
)
def test_tokens_that_stay_are_those_of_the_formula_on_what_is_read(codec, method, length, budget):
    """And they are coded once more in their new pages; those behind the last full one lie in the open page as read."""
    keep = Keep(method, budget=budget, sink=3, recent=10, window=12, pool=5, interval=12)
    cut, (kept,) = CodedCut(codec, keep, length, seed=length), keep.eviction(length).kept
    for layer in range(LAYERS):
        keys, values = (x.astype(np.float64) for x in cut.tokens(cut.kv, layer, cut.table, length))
        scores = formula(cut, layer, keys.swapaxes(0, 1), values.swapaxes(0, 1))
        recent = max(keep.recent, keep.window if keep.observes == "last" else 0)
        slots = oracle.best(scores, kept, keep.sink, recent)
        for axis, old, new in zip((-2, -1), (keys, values), cut.tokens(cut.after, layer, cut.new, kept), strict=True):
            wanted = np.take_along_axis(old, slots[..., None], axis=1)
            full = kept // P * P
            paged = jnp.asarray(wanted[:, :full].reshape(2, -1, P, DIM), jnp.float32)
            coded, scale, zero = codes.encode(paged, codec, axis, jnp.float32)
            packed = codes.pack(coded) if codec == "int4" else coded
            again = np.asarray(codes.decode(packed, codec, axis, scale, zero)).reshape(2, full, DIM)
            np.testing.assert_allclose(new[:, full:], wanted[:, full:], rtol=1e-5, atol=1e-6)
            apart = np.abs(new[:, :full] - again)
            assert np.median(apart) < 1e-6  # a value between two codes may fall to either of them
            assert (apart > 1e-5).mean() < 0.02


def formula(cut: CodedCut, layer: int, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scores [K, n] by the oracle, of keys and values [n, K, D]."""
    keep, queries, length = cut.keep, cut.queries[layer].astype(np.float64), cut.length
    last = oracle.rotate(queries, np.arange(length - keep.window, length), cut.theta)
    return {
        "snapkv": lambda: oracle.window_attention(last, keys, keep.pool),
        "rkv": lambda: oracle.redundancy_aware(last, keys, keep.pool),
        "keydiff": lambda: -oracle.likeness(keys),
        "expected_attention": lambda: oracle.expected_attention(
            queries[: -(-length // -(-length // keep.window))], keys, values, length, cut.theta
        ),
    }[keep.method]()


PROMPTS = random_prompts(6, (70, 150, 3, 230, 90))
KEEPS = [name for name, preset in PRESETS.items() if preset.keep.method != "all" and preset.keep.beta == 1]
SMALL = {"budget": 40, "sink": 3, "recent": 12, "window": 12, "pool": 3, "interval": 17}
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
QUEST = dataclasses.replace(GREEDY, sparsity={"preset": "quest", "budget": 48, "recent": 16})


def asking(name: str, **changed) -> SamplingParams:
    return dataclasses.replace(GREEDY, sparsity={"preset": name, **SMALL, **changed})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def engine_of(codec: str, *policies, **settings):
    return tiny_engine(tiny_model(), sparsity=(codec, *policies), max_num_seqs=4, **settings)


@pytest.fixture(scope="module", params=["int4", *(pytest.param(c, marks=pytest.mark.slow) for c in CODECS[:2])])
def engine(request):
    with engine_of(request.param, *(asking(name, budget=300).sparsity for name in KEEPS), QUEST.sparsity) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    requests = {"all": GREEDY, **{name: asking(name) for name in KEEPS}, "quest": QUEST}
    return {name: [tokens(engine.generate(p, asked))[0] for p in PROMPTS] for name, asked in requests.items()}


def test_a_budget_that_covers_the_sequence_changes_nothing(engine, alone):
    for name in KEEPS:
        assert tokens(engine.generate(PROMPTS, asking(name, budget=300))) == alone["all"], name
    assert len({str(alone[name][3]) for name in ("all", *KEEPS)}) == len(KEEPS) + 1
    assert all(alone[name][2] == alone["all"][2] for name in KEEPS), "a short prompt keeps everything"


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(engine, alone):
    before = engine.stats()["compiles"]
    asked = {"all": GREEDY, **{name: asking(name) for name in KEEPS}, "quest": QUEST}
    requests = [(place, name) for place in range(len(PROMPTS)) for name in asked]
    outputs = engine.generate([PROMPTS[place] for place, _ in requests], [asked[name] for _, name in requests])
    assert tokens(outputs) == [alone[name][place] for place, name in requests]
    assert engine.stats()["compiles"] == before
    assert engine.stats()["kv_live_pages"] == 0


def test_preempted_equals_uninterrupted(engine, alone):
    growing, long = random_prompts(7, (9,) * 3), dataclasses.replace(GREEDY, max_tokens=90)
    wanted = tokens(engine.generate(growing, long))
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 20)
    try:
        for name in KEEPS:
            before = engine.stats()["num_preemptions"]
            params = [long] * len(growing) + [asking(name)] * len(PROMPTS)
            assert tokens(engine.generate([*growing, *PROMPTS], params)) == [*wanted, *alone[name]], name
            assert engine.stats()["num_preemptions"] > before, name
    finally:
        allocator.release(taken)
    assert engine.stats()["kv_live_pages"] == 0


def test_chunks_do_not_change_tokens(engine, alone):
    codec = engine.core.runner.state.kv.group.layout.sealed.codec
    counting_none = [name for name in KEEPS if name != "h2o"]  # its programs take longest to compile
    with engine_of(codec, *(asking(name).sparsity for name in counting_none), max_num_batched_tokens=20) as other:
        for name in counting_none:
            assert tokens(other.generate(PROMPTS, asking(name))) == alone[name], name


def test_pools_are_updated_in_place(engine, alone):
    assert_in_place(engine)


def test_h2o_counts_what_queries_give_to_codes_and_to_their_own_page(engine, alone):
    core, codec = engine.core, engine.core.runner.state.kv.group.layout.sealed.codec
    for name, prompt in zip("abc", PROMPTS, strict=False):
        engine.add_request(name, prompt, asking("h2o", budget=300))
    for _ in range(10):
        engine.step()
    # Steps run one ahead of what the host knows: take in the results of the last one, start no other.
    core.put_back(core._collect(core._in_flight))
    core._in_flight = None
    assert len(core.scheduler.running) == 3
    for sequence in core.scheduler.running:
        known = sequence.tokens[: sequence.num_computed]
        _, reference = read(tiny_model(), SealedReference(codec, P, tiny_model().config.windows), known)
        for seen, given in zip(core.runner.state.kv.observed, reference.given, strict=True):
            mass = jnp.moveaxis(seen.mass[jnp.asarray(sequence.pages)], 1, 0).reshape(2, -1)
            np.testing.assert_allclose(mass[:, : len(known)], given, atol=2e-3)
    engine.abort(list("abc"))
    while engine.has_unfinished():
        engine.step()
