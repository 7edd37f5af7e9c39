"""Latent widths and codecs of layers under a byte budget, and the report of what they cost."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.deltakv import Grid
from sparsejax.cache.plan import Plan
from sparsejax.errors import ConfigError
from tests.engine.models import tiny_model
from train.calibrate import Rate, allocated, nats, page_bytes, rates
from train.compressor import Settings
from train.pairs import pairs_of, principal
from train.report import cells, layer_rows

GRID = Grid(8, 4, references=4)
RATES = [Rate(width, codec) for width in (8, 16, 24, 32) for codec in ("int4", "int8")]


@pytest.fixture(scope="module")
def cfg():
    return tiny_model().config


@pytest.fixture(scope="module")
def kept() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, 40, 2, 2, 16)) * np.geomspace(2, 0.1, 16)).astype(np.float32)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[int, list[float]], list[int], int]:
    """Errors by layer and choice, sizes, and a budget that one of the choices takes in all layers, or more."""
    layers, choices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 50), min_size=choices, max_size=choices))
    row = st.lists(st.floats(0, 1), min_size=choices, max_size=choices)
    errors = draw(st.lists(row, min_size=layers, max_size=layers))
    budget = draw(st.sampled_from(sizes)) * layers + draw(st.integers(0, 20))
    return dict(enumerate(errors)), sizes, budget


def spent(errors: dict[int, list[float]], sizes: list[int], chosen: dict[int, int]) -> tuple[int, float]:
    return sum(sizes[i] for i in chosen.values()), sum(errors[layer][i] for layer, i in chosen.items())


@given(tables())
def test_no_choice_within_the_budget_is_better(table):
    """Every way to choose is tried, the uniform ones among them."""
    errors, sizes, budget = table
    held, error = spent(errors, sizes, allocated(errors, sizes, budget))
    ways = (dict(zip(errors, way, strict=True)) for way in itertools.product(range(len(sizes)), repeat=len(errors)))
    best = min(cost for size, cost in (spent(errors, sizes, way) for way in ways) if size <= budget)
    assert held <= budget and error == pytest.approx(best, abs=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_many_layers_are_never_worse_than_the_same_choice_for_all(seed):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(10, 1000, 12)]
    errors = {layer: list(map(float, rng.exponential(size=12))) for layer in range(30)}
    uniform = int(rng.integers(12))
    held, error = spent(errors, sizes, allocated(errors, sizes, 30 * sizes[uniform]))
    assert held <= 30 * sizes[uniform] and error <= sum(row[uniform] for row in errors.values()) + 1e-9


def test_errors_decide_who_gets_the_bytes():
    errors = {1: (0.5, 0.1, 0.0), 2: (0.5, 0.45, 0.44), 3: (0.2, 0.1, 0.05)}
    assert allocated(errors, (8, 16, 24), 48) == {1: 2, 2: 0, 3: 1}
    assert allocated(errors, (8, 16, 24), 24) == {1: 0, 2: 0, 3: 0}
    with pytest.raises(ConfigError, match="3 layers take 24 bytes of a page at least, which exceeds the budget of 23"):
        allocated(errors, (8, 16, 24), 23)


def test_a_page_takes_what_the_plan_says(cfg):
    plan = Plan(GRID, (8, 32), (), codecs=("int4", "int8"))
    layouts = plan.group(cfg, jnp.bfloat16, 1, 1).layouts
    found = [page_bytes(cfg, GRID, rate) for rate in (Rate(8, "int4"), Rate(32, "int8"))]
    assert found == [layout.page_bytes for layout in layouts]


def test_layers_that_answers_depend_on_get_more_bytes(cfg, kept):
    """The same vectors, a hundred times as much at stake in one of the layers; bits and widths are chosen together."""
    small = jnp.eye(64)[None] * 1e-3
    metric = {"1": small, "2": 100 * small}
    pairs = {layer: pairs_of(kept, GRID, 1, one) for layer, one in metric.items()}
    uniform = Rate(16, "int8")
    budget = 2 * page_bytes(cfg, GRID, uniform)
    chosen = rates(pairs, metric, cfg, RATES, budget)
    low, high = (page_bytes(cfg, GRID, chosen[layer]) for layer in (1, 2))
    assert low < high and low + high <= budget

    def lost(rate: Rate, layer: str) -> float:
        return nats(principal(pairs[layer], rate.width, 1, 0), pairs[layer].stored_as(rate.codec), metric[layer])

    assert sum(lost(chosen[int(layer)], layer) for layer in pairs) < sum(lost(uniform, layer) for layer in pairs)
    assert {rate.codec for rate in rates(pairs, metric, cfg, RATES, 10 * budget).values()} == {"int8"}


def test_the_report_lists_every_layer_and_their_sum(cfg):
    cfg = dataclasses.replace(cfg, num_layers=3, windows=(None,) * 3)
    made = Settings(GRID, latent=(8, 32), codecs=("int4", "int8"), filter_layers=(0,), filter_codec="int4")
    errors = {"components": {"1": 0.25, "2": 0.5}, "trained": {"1": 0.125, "2": 0.25}}
    rows = layer_rows(made, cfg, (0.9, 0.5, 1.0), **errors)
    assert [row["role"] for row in rows] == ["filter", "sparse", "sparse"]
    group = made.plan.group(cfg, jnp.bfloat16, 1, 1)
    assert sum(row["bytes_per_token"] for row in rows) * 8 == group.page_bytes
    header, first, *_, last = cells(rows)
    assert len({*map(len, cells(rows))}) == 1 and first[:4] == ("0", "filter", "0.90", "") and first[-2:] == ("", "")
    assert cells(rows)[3][3:5] == ("32", "int8") and last[-2:] == ("0.750000", "0.375000")
    unmeasured = cells(layer_rows(made, cfg, (0.9, 0.5, 1.0), components={}, trained={}))
    assert unmeasured[-1][-2:] == ("", "")
