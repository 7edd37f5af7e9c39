"""The byte calculator equals what is allocated, and its table for the published shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.deltakv import Grid
from sparsejax.cache.codecs.deltakv import DeltaPages
from sparsejax.cache.plan import Plan, cache_bytes
from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig, RopeConfig
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_config

# Layers, KV heads, filter layers and latent width of the published compressors (Qwen3-8B: that of Qwen3-4B).
MODELS = {
    "Llama-3.1-8B": (32, 8, (0, 1, 2, 8, 18), 512),
    "Qwen2.5-7B": (28, 4, (0, 1, 2, 4, 7, 14), 256),
    "Qwen3-8B": (36, 8, (0, 1, 2, 3, 8, 16, 22), 512),
}
# Percent of bfloat16: filter layers int8, then int4, each with the whole latent and with 3/4 of it; at 32K and 128K.
TABLE = {
    "Llama-3.1-8B": {32: (17.7, 16.1, 14.1, 12.5), 128: (17.6, 16.0, 14.0, 12.4)},
    "Qwen2.5-7B": {32: (20.3, 18.8, 15.3, 13.9), 128: (20.2, 18.7, 15.3, 13.8)},
    "Qwen3-8B": {32: (19.4, 17.9, 14.9, 13.4), 128: (19.3, 17.8, 14.8, 13.3)},
}

# The default, int4 filter layers with the whole latent, at 128K in the layouts of each platform, by model.
DEFAULT = {"cpu": (14.0, 15.3, 14.8), "gpu": (14.3, 15.6, 15.1), "tpu": (14.8, 16.4, 15.6)}


def shape(name: str) -> DecoderConfig:
    layers, kv_heads, _, _ = MODELS[name]
    sizes = {"num_layers": layers, "num_heads": 32, "num_kv_heads": kv_heads, "head_dim": 128}
    return dataclasses.replace(load_config(EMBEDDED), windows=(None,) * layers, **sizes)


def share(name: str, tokens: int, codec: str, part: float, platform: str = "cpu") -> float:
    filters, latent = MODELS[name][2:]
    plan = Plan(Grid(), int(latent * part), filters, codec)
    found = cache_bytes(shape(name), plan, tokens, bounds=True, platform=platform)
    return 100 * found["total"] / found["dense"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("thousands", (32, 128))
def test_table(name: str, thousands: int):
    settings = [(codec, part) for codec in ("int8", "int4") for part in (1, 0.75)]
    found = tuple(round(share(name, thousands * 1024, *setting), 1) for setting in settings)
    assert found == TABLE[name][thousands]


@pytest.mark.parametrize("platform", DEFAULT)
def test_the_default_keeps_its_goal_in_the_layouts_of_every_platform(platform: str):
    found = tuple(round(share(name, 131072, "int4", 1, platform), 1) for name in MODELS)
    assert found == DEFAULT[platform]
    assert max(found) <= 20


@pytest.mark.parametrize("platform", DEFAULT)
@pytest.mark.parametrize("head_dim", (16, 64, 128))
def test_the_calculator_says_what_a_group_allocates(platform: str, head_dim: int):
    cfg = dataclasses.replace(shape("Qwen2.5-7B"), num_layers=3, windows=(None,) * 3, head_dim=head_dim)
    plan, tokens = Plan(Grid(), 32, (0,)), 100
    group = plan.group(cfg, jnp.dtype(jnp.bfloat16), 5, 1, platform)  # four pages of 32 and the dump page
    stored = sum(pool.nbytes for layout in group.layouts for pool in jax.tree.leaves(layout.zeros()))
    told = cache_bytes(cfg, plan, tokens, platform=platform)
    assert stored == group.pool_bytes == told["total"] + group.page_bytes + group.row_bytes


def test_goals():
    assert all(share(name, 131072, "int4", 0.75) <= 15 for name in MODELS)


@pytest.mark.parametrize("platform", ("cpu", "gpu", "tpu"))
@pytest.mark.parametrize("grid", (Grid(), Grid(16, 16, latents="int8"), Grid(16, 8, centers="none", latents="none")))
def test_a_page_takes_what_its_pools_allocate(grid: Grid, platform: str):
    pages = DeltaPages(grid, RopeConfig(), 5, 4, 16, 12, 2, jnp.dtype(jnp.bfloat16), platform)
    assert sum(pool.nbytes for pool in jax.tree.leaves(pages.zeros())) == 5 * pages.page_bytes


def test_components_sum_to_the_total():
    found = cache_bytes(shape("Qwen3-8B"), Plan(Grid(), 512, (0, 1), "int4", groups=4), 1000)
    assert sum(held for name, held in found.items() if name not in ("total", "dense")) == found["total"]
    assert found["dense"] == 36 * 1024 * 2 * 8 * 128 * 2


def test_layers_count_with_their_own_codecs():
    """One layer of 34 in int8: what it takes more is a byte for two tokens and channel, less the zeros."""
    cfg, codecs = shape("Qwen3-8B"), ("int8", *["int4"] * 33)
    mixed, plain = (cache_bytes(cfg, Plan(Grid(), 512, (0, 1), codecs=one), 1024) for one in (codecs, None))
    differing = {name: mixed[name] - held for name, held in plain.items() if mixed[name] != held}
    codes, zeros = 32 * 15 * 512, 32 * 2 * 512
    assert differing == {"latents": codes, "latent_scales": -zeros, "total": codes - zeros}


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="34 sparse layers need as many latent widths; got 2"):
        cache_bytes(shape("Qwen3-8B"), Plan(Grid(), (512, 256), (0, 1)), 1000)
    with pytest.raises(ConfigError, match="34 sparse layers need as many latent codecs; got 1"):
        cache_bytes(shape("Qwen3-8B"), Plan(Grid(), 512, (0, 1), codecs=("int8",)), 1000)
    with pytest.raises(ConfigError, match="does not divide into 3 head groups"):
        cache_bytes(shape("Qwen3-8B"), Plan(Grid(), 512, (0, 1), groups=3), 1000)
    with pytest.raises(ConfigError, match="head groups must divide the 4 KV heads; got 3"):
        DeltaPages(Grid(), RopeConfig(), 2, 4, 16, 4, 3, jnp.dtype(jnp.bfloat16))
