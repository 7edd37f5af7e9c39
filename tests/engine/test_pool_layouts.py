"""Engines whose pools have the TPU layouts give what plain pools give."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.cache import group
from sparsejax.cache.layout import DenseLayout

from .models import random_prompts, tiny_engine, tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def tokens_and_bytes(codec: str) -> tuple[list[list[int]], int]:
    with tiny_engine(sparsity=codec) as engine:
        outputs = engine.generate(random_prompts(3, (5, 40)), PARAMS)
        return [output.outputs[0].token_ids for output in outputs], engine.memory()["kv_pages"]


@pytest.mark.parametrize("codec", ["dense", "int4"])
def test_tokens_do_not_depend_on_the_layout(monkeypatch, codec):
    plain, plain_bytes = tokens_and_bytes(codec)
    monkeypatch.setattr(group, "dense_group", functools.partial(_for_tpu, group.dense_group))
    side_by_side, side_bytes = tokens_and_bytes(codec)
    assert side_by_side == plain
    if codec == "dense":
        assert side_bytes == plain_bytes * 128 // (2 * tiny_model().config.head_dim)
    else:
        assert side_bytes > plain_bytes


def _for_tpu(make, config, page_size, dtype, num_pages, platform):
    return make(config, page_size, dtype, num_pages, "tpu")


@pytest.mark.parametrize(
    ("head_dim", "pools", "lanes"), ((64, 1, 128), (80, 2, 128), (128, 2, 128), (192, 2, 256))
)
def test_tpu_pools_have_whole_lanes(head_dim, pools, lanes):
    layout = DenseLayout.for_tpu(4, 2, 16, head_dim, np.dtype("float32"))
    assert layout.shape == (4, 2, 16, lanes)
    arrays = [pool for pool in layout.zeros() if pool is not None]
    assert len(arrays) == pools and sum(pool.nbytes for pool in arrays) == layout.pool_bytes


def test_plain_pools_are_as_wide_as_the_head():
    layout = DenseLayout.plain(4, 2, 16, 80, np.dtype("float32"))
    assert [pool.shape for pool in layout.zeros()] == [(4, 2, 16, 80)] * 2
    assert layout.pool_bytes == 2 * 4 * 2 * 16 * 80 * 4
