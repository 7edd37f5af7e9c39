"""What every backend of `select_pages` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import select_pages

from . import sparse_oracle
from .conformance import Conformance


@dataclasses.dataclass(frozen=True)
class SelectSpec:
    """Lists of `counts` pages; `lists` KV heads are scored, and share a list of pages unless `head_lists`."""

    name: str
    counts: tuple[int, ...]
    budgets: tuple[int, ...]
    width: int
    lists: int = 2
    pages: int = 40
    head_lists: bool = False
    head_budgets: bool = False
    sinks: tuple[int, ...] | None = None
    recents: tuple[int, ...] | None = None
    logical: bool = False
    ties: bool = False

    def __str__(self) -> str:
        return self.name


SPECS = (
    SelectSpec("one row", (40,), (7,), 8),
    SelectSpec("budgets differ", (40, 3, 17, 0), (5, 8, 1, 4), 8),
    SelectSpec("budget holds all", (9, 40), (40, 40), 40),
    SelectSpec("width holds all and more", (9, 12), (40, 10), 48),
    SelectSpec("sinks and recents", (40, 30, 2), (6, 9, 4), 9, sinks=(2, 1, 3), recents=(1, 4, 2)),
    SelectSpec("pinned beyond the budget", (40, 30), (1, 0), 8, sinks=(2, 0), recents=(3, 2)),
    SelectSpec("pinned beyond the width", (40, 30), (4, 9), 4, sinks=(3, 9), recents=(3, 9)),
    SelectSpec("no recents", (40, 30), (5, 0), 8, recents=(0, 0)),
    SelectSpec("ties", (40, 33), (11, 6), 12, ties=True),
    SelectSpec("one selection for all heads", (40, 30), (6, 9), 9, lists=1),
    SelectSpec("head lists", (40, 11), (6, 9), 9, lists=3, head_lists=True, logical=True, sinks=(1, 1)),
    SelectSpec("head budgets", (40, 25), (6, 9), 12, lists=3, head_budgets=True, logical=True),
    SelectSpec("one page wide", (40, 1), (3, 3), 1),
    SelectSpec("many pages", (1037, 300), (64, 64), 64, pages=1037, sinks=(1, 1), recents=(2, 2)),
)


class SelectPagesConformance(Conformance):
    """Subclass it with the name of a backend."""

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: SelectSpec):
        rng = np.random.default_rng(11)
        rows, shape = len(spec.counts), (len(spec.counts), spec.lists, spec.pages)
        scores = rng.standard_normal(shape).astype(np.float32)
        if spec.ties:
            scores = np.round(scores) * rng.choice([-1, 1], shape).astype(np.float32)  # both zeros
        kinds = spec.lists if spec.head_lists else 1
        counts = np.repeat(np.asarray(spec.counts, np.int32)[:, None], kinds, axis=1)
        counts[:, 1:] = rng.integers(0, counts[:, 1:] + 1)
        page_ids = rng.permutation(rows * kinds * spec.pages).reshape(rows, kinds, -1).astype(np.int32)
        logical_ids = np.cumsum(rng.integers(1, 4, page_ids.shape), axis=-1).astype(np.int32)
        sinks, recents = (None if x is None else np.asarray(x, np.int32) for x in (spec.sinks, spec.recents))
        for row, which in np.ndindex(rows, spec.lists):
            count = int(counts[row, min(which, kinds - 1)])
            scores[row, which, count:] = np.nan
            pinned = sparse_oracle.pinned_entries(row, count, spec.width, sinks, recents)
            scores[row, which, pinned] = np.nan
        budgets = np.asarray(spec.budgets, np.int32)
        if spec.head_budgets:
            budgets = rng.integers(0, budgets[:, None] + 1, (rows, spec.lists)).astype(np.int32)
        logical = logical_ids if spec.logical else None
        got = self.run(
            select_pages,
            scores,
            page_ids,
            counts,
            budgets,
            width=spec.width,
            sinks=sinks,
            recents=recents,
            logical_ids=logical,
        )
        unread = np.where(np.isnan(scores), -np.inf, scores)
        expected = sparse_oracle.select(
            unread, page_ids, counts, budgets, spec.width, sinks, recents, logical
        )
        assert got.page_ids.shape == (rows, spec.lists, spec.width)
        for row, which in np.ndindex(rows, spec.lists):
            count = got.counts[row, which]
            chosen = list(zip(got.page_ids[row, which], got.logical_ids[row, which], strict=True))
            assert chosen[:count] == expected[row][which]
            assert not any(map(any, chosen[count:]))
