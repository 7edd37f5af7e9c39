"""What `deltakv_decode_attention` must give, stated for any backend; see `conformance`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NoImplementation, deltakv_decode_attention
from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import read_pages

from .cases import DTYPES
from .conformance import Conformance
from .deltakv_cases import Sizes, build, compressor, frequencies, rotate, sealed

SOFT = {"soft_cap": 2.0, "scale": 0.7, "magnitude": 1.3}


@dataclasses.dataclass(frozen=True)
class Latents:
    """A case: the grid, head groups, and sizes of what is coded."""

    name: str
    grid: Grid
    groups: int = 1
    sizes: Sizes = Sizes()
    dtype: str = "f32"

    def __str__(self) -> str:
        return self.name


SPECS = (
    Latents("usual", Grid(8, 4)),
    Latents("two groups, int8", Grid(8, 2, neighbours=2, latents="int8"), 2),
    Latents("odd number of others", Grid(8, 8, references=3, shortlist=2), 2),
    Latents("nothing rounded", Grid(8, 4, centers="none", latents="none")),
)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


class DeltakvDecodeConformance(Conformance):
    """Attention over listed pages of latents."""

    tolerance = {"f32": 1e-4, "bf16": 3e-2}

    def serves(self, spec: Latents) -> bool:
        """Whether the backend serves the case."""
        return True

    @each_spec
    @pytest.mark.parametrize("options", [{}, SOFT], ids=str)
    def test_agrees_with_the_oracle(self, spec: Latents, options: dict):
        self.compare(spec, options, logical=True)

    @pytest.mark.parametrize("spec", SPECS[:1], ids=str)
    def test_all_pages_of_a_row_need_no_logical_ids(self, spec: Latents):
        self.compare(spec, {}, logical=False)

    def compare(self, spec: Latents, options: dict, logical: bool) -> None:
        """Rows that list some of their pages, with a page that is cut by the length, and one that lists none."""
        grid, sizes, page = spec.grid, spec.sizes, spec.grid.page_size
        case = build(grid, (9 * page, 3 * page, page), spec.groups, sizes=sizes)
        weights = compressor(spec.groups, sizes)
        pools = sealed(case, weights, grid)
        listed = [[0, 1, 3, 4, 7, 8], [0, 2], []] if logical else [[*range(9)], [0, 1], []]
        width = 11
        page_ids, places = np.full((3, 1, width), 10**6, np.int32), np.full((3, 1, width), -5, np.int32)
        for row, chosen in enumerate(listed):
            page_ids[row, 0, : len(chosen)] = case.tables[row, chosen]
            places[row, 0, : len(chosen)] = chosen
        counts = np.asarray([[len(chosen)] for chosen in listed], np.int32)
        lengths = np.asarray([9 * page - 2, 3 * page, page], np.int32)
        heads = sizes.group * sizes.kv_heads
        q = np.random.default_rng(5).standard_normal((3, heads, sizes.head_dim))
        q = q.astype(DTYPES[spec.dtype])
        args = (q, pools, weights, frequencies(sizes.head_dim), page_ids, counts, lengths, case.tables)
        named = {"logical_ids": places} if logical else {}
        call = lambda: self.run(deltakv_decode_attention, *args, grid=grid, return_lse=True, **named, **options)  # noqa: E731
        if not self.serves(spec):
            with pytest.raises(NoImplementation, match=self.backend):
                call()
            return
        out, lse = call()
        for row, chosen in enumerate(listed):
            table = jnp.asarray(case.tables[row])
            x = read_pages(pools, weights, table[: len(case.x[row]) // page], table, grid)
            x = np.asarray(x, np.float64).reshape(-1, sizes.kv_heads, 2, sizes.head_dim)
            tokens = [p * page + o for p in chosen for o in range(page) if p * page + o < lengths[row]]
            for head in range(heads):
                if not tokens:
                    assert not out[row, head].any() and lse[row, head] < -1e29
                    continue
                of = head // sizes.group
                keys = np.stack([rotate(x[t, of, 0], t) for t in tokens]) * options.get("magnitude", 1.0)
                scores = keys @ q[row, head].astype(np.float64) * options.get("scale", sizes.head_dim**-0.5)
                if "soft_cap" in options:
                    scores = options["soft_cap"] * np.tanh(scores / options["soft_cap"])
                total = np.log(np.exp(scores).sum())
                self.close(lse[row, head], total, spec.dtype, "lse")
                expected = np.exp(scores - total) @ np.stack([x[t, of, 1] for t in tokens])
                self.close(out[row, head], expected, spec.dtype)
