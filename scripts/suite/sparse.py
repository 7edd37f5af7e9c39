"""Operations on pages beside attention, on the device against float64: bounds, scores, mass, selection, codecs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels import codes
from suite import coded, exact, paged
from suite.compare import compared
from suite.records import Run

LENGTHS = (1500, 33, 700, 64)
WINDOW = 16
EIGHT = {"heads": 32, "kv_heads": 8, "head_dim": 128}
VARIANTS = {"": {}, ", eight heads": EIGHT, ", one head": {"heads": 4, "kv_heads": 1, "head_dim": 128}}
REDUCTIONS = {"sum": np.sum, "mean": np.mean, "max": np.max}


def cases(seed: int, tiny: bool, implementation: Any = None) -> Iterator[tuple[str, Run]]:
    """The cases of these operations; `tiny` ones are small enough for a CPU."""
    lengths = LENGTHS[1::2] if tiny else LENGTHS
    checks = {"page_bounds": page_bounds}
    checks |= {f"page_scores{name}": functools.partial(page_scores, more) for name, more in VARIANTS.items()}
    checks |= {
        "select_pages": select_pages,
        "attention_mass": functools.partial(attention_mass, {}, "sum"),
        "attention_mass, eight heads": functools.partial(attention_mass, EIGHT, "sum"),
        "attention_mass, largest of a group": functools.partial(attention_mass, EIGHT, "max"),
        "attention_mass, int8": functools.partial(attention_mass, {"codec": "int8"}, "sum"),
        "attention_mass, fp8": functools.partial(attention_mass, {"codec": "fp8"}, "mean"),
        "attention_mass, int4": functools.partial(attention_mass, EIGHT | {"codec": "int4"}, "max"),
        "page_scores, select_pages, paged_decode_attention": quest,
        "window_scores": functools.partial(window_scores, {}, "mean"),
        "window_scores, largest of a group": functools.partial(window_scores, EIGHT, "max"),
        "quantize_pages and open_pages, int8": functools.partial(codec, "int8"),
        "quantize_pages and open_pages, fp8": functools.partial(codec, "fp8"),
        "quantize_pages and open_pages, int4": functools.partial(codec, "int4"),
    }
    for name, check in checks.items():
        yield name, functools.partial(check, seed, lengths, implementation)


def _drawn(seed: int, lengths: tuple[int, ...], *queries: Any, **more: Any) -> paged.Case:
    return paged.draw(np.random.default_rng(seed), lengths, *queries, **{"head_dim": 64} | more)


def _served(op: str, implementation: Any, *arrays: Any, **options: Any) -> tuple[Any, str | None]:
    """What an op gives, and the backend that serves it."""
    chosen, _ = kernels.explain(op, *arrays, implementation=implementation, **options)
    static = {name: value for name, value in options.items() if not hasattr(value, "shape")}
    named = {name: value for name, value in options.items() if name not in static}
    call = _jitted(getattr(kernels, op), implementation, **static)
    return jax.tree.map(np.asarray, call(*arrays, **named)), chosen


def _jitted(op: Callable[..., Any], implementation: Any, **static: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(op, implementation=implementation, **static))


def _full(case: paged.Case) -> np.ndarray:
    """Ids of the pages that hold a token in every slot."""
    dead = np.isnan(case.k_pages.astype(np.float32)).any((1, 2, 3))
    return np.flatnonzero(~dead).astype(np.int32)


def _bounds(case: paged.Case) -> np.ndarray:
    """Minimum and maximum [N, K, 2D] of every full page, NaN for others."""
    keys = case.k_pages.astype(np.float32)
    return np.concatenate([keys.min(2), keys.max(2)], axis=-1)


def page_bounds(seed: int, lengths: tuple[int, ...], implementation: Any) -> dict[str, Any]:
    """Smallest and largest keys, exactly."""
    case = _drawn(seed, lengths)
    pages = _full(case)
    empty = np.zeros((len(case.k_pages), case.kv_heads, 128), np.float32)
    got = np.asarray(_jitted(kernels.page_bounds, implementation)(empty, case.k_pages, pages))
    return compared(got[pages], _bounds(case)[pages].astype(np.float64), 0.0)


def page_scores(more: dict[str, int], seed: int, lengths: tuple[int, ...], implementation: Any) -> dict[str, Any]:
    """The bound of the scores, for the pages that are full."""
    case = _drawn(seed, lengths, **more)
    bounds, counts = _bounds(case).astype(jnp.bfloat16), (case.lengths // case.page)[:, None].astype(np.int32)
    got, chosen = _served("page_scores", implementation, case.q, bounds, case.page_ids, counts)
    low, high = np.split(bounds.astype(np.float64), 2, axis=-1)
    worst = 0.0
    for row, count in enumerate(counts[:, 0]):
        ids = case.page_ids[row, 0, :count]
        queries = case.q[row].astype(np.float64).reshape(case.kv_heads, 1, -1, case.q.shape[-1])
        sides = [queries * side[ids].swapaxes(0, 1)[:, :, None] for side in (low, high)]
        expected = np.maximum(*sides).sum(-1).max(-1) * case.scale
        worst = max(worst, compared(got[row, :, :count], expected, 2e-2)["max_error"])
    return {"backend": chosen, "max_error": worst}


def select_pages(seed: int, lengths: tuple[int, ...], implementation: Any) -> dict[str, Any]:
    """The best pages, in order; the first and the last page always."""
    case, rng = _drawn(seed, lengths), np.random.default_rng(seed + 1)
    scores = rng.standard_normal((len(lengths), case.kv_heads, case.page_ids.shape[2]), np.float32)
    budgets, ones = np.full(len(lengths), 5, np.int32), np.ones(len(lengths), np.int32)
    select = _jitted(kernels.select_pages, implementation, width=8)
    got = select(scores, case.page_ids, case.counts, budgets, sinks=ones, recents=ones)
    for row, head in np.ndindex(scores.shape[:2]):
        count = int(case.counts[row, 0])
        ranked = np.where(np.isin(np.arange(count), (0, count - 1)), np.inf, scores[row, head, :count])
        chosen = np.sort(np.argsort(-ranked, kind="stable")[: min(5, count)])
        taken = np.asarray(got[1])[row, head, : int(np.asarray(got[2])[row, head])]
        if not np.array_equal(taken, chosen):
            raise AssertionError(f"row {row}, head {head}: {taken.tolist()} instead of {chosen.tolist()}")
    return {"max_error": 0.0}


def quest(seed: int, lengths: tuple[int, ...], implementation: Any) -> dict[str, Any]:
    """A step of dynamic selection: bounds to scores, scores to lists of five pages, attention over these alone."""
    case = _drawn(seed, lengths)
    bounds = np.nan_to_num(_bounds(case)).astype(jnp.bfloat16)
    lists = (case.page_ids, case.counts)
    scores, scored = _served("page_scores", implementation, case.q, bounds, *lists)
    budgets, ones = np.full(len(lengths), 5, np.int32), np.ones(len(lengths), np.int32)
    pinned = {"sinks": ones, "recents": ones}
    (ids, logical, counts), _ = _served("select_pages", implementation, scores, *lists, budgets, width=8, **pinned)
    case = dataclasses.replace(case, page_ids=ids, counts=counts, logical_ids=logical)
    out, read = _served("paged_decode_attention", implementation, *case.arrays(), logical_ids=logical)
    if (counts > 5).any():
        raise AssertionError(f"lists of {counts.max()} pages under a budget of 5")
    return {"backend": f"{scored} and {read}", **compared(out, exact.attend(case)[0], 1e-2)}


def attention_mass(
    more: dict[str, Any], group: str, seed: int, lengths: tuple[int, ...], implementation: Any
) -> dict[str, Any]:
    """The probabilities of each page, under the exact log-sum-exp."""
    given = dict(more)
    codec = given.pop("codec", None)
    case = _drawn(seed, lengths, **given)
    keys, scales = case.k_pages, {}
    if codec is not None:
        case = coded.encode(case, codec)
        keys, scales = case.k_codes, {"scales": case.scales}
    lse = exact.attend(case)[1]
    arrays = (case.q, keys, case.page_ids, case.counts, case.lengths, lse.astype(np.float32))
    got, chosen = _served("attention_mass", implementation, *arrays, group=group, **scales)
    expected = np.zeros(got.shape)
    for row, head in np.ndindex(len(lengths), case.kv_heads):
        p = _probabilities(case, row, head, case.q[row : row + 1], lse[row : row + 1])[0]
        pages = case.counts[row, 0]
        expected[row, head, :pages] = REDUCTIONS[group](p.reshape(len(p), pages, case.page).sum(-1), axis=0)
    return {"backend": chosen, **compared(got, expected, 2e-2)}


def window_scores(
    more: dict[str, int], group: str, seed: int, lengths: tuple[int, ...], implementation: Any
) -> dict[str, Any]:
    """The probabilities that the last queries of a row give to each slot."""
    chunk = _drawn(seed, lengths, (WINDOW,) * len(lengths), **more)
    q = chunk.q.reshape(len(lengths), WINDOW, *chunk.q.shape[1:])
    lists = (chunk.page_ids, chunk.counts, chunk.lengths)
    got, chosen = _served("window_scores", implementation, q, chunk.k_pages, *lists, group=group)
    lse = exact.attend(chunk)[1].reshape(q.shape[:3])
    expected = np.zeros(got.shape)
    for row, head in np.ndindex(len(lengths), chunk.kv_heads):
        pages = chunk.counts[row, 0]
        p = REDUCTIONS[group](_probabilities(chunk, row, head, q[row], lse[row]), axis=1)
        expected[row, head, :pages] = p.sum(0).reshape(pages, chunk.page)
    return {"backend": chosen, **compared(got, expected, 2e-2)}


def _probabilities(case: paged.Case, row: int, head: int, q: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """Probabilities [W, G, S * P] of the listed slots of a row under its last W queries [W, H, D]."""
    group = q.shape[1] // case.kv_heads
    mine = slice(head * group, (head + 1) * group)
    keys = case.keys(case.page_ids[row, 0, : case.counts[row, 0]], head).reshape(-1, q.shape[-1])
    positions = case.lengths[row] - len(q) + np.arange(len(q))
    seen = np.arange(len(keys)) <= positions[:, None, None]
    keys = np.where(seen.any((0, 1))[:, None], keys, 0)
    scores = np.einsum("wgd,sd->wgs", q[:, mine].astype(np.float64), keys) * case.scale
    return np.where(seen, np.exp(np.where(seen, scores - lse[:, mine, None], 0)), 0)


def codec(name: str, seed: int, lengths: tuple[int, ...], implementation: Any) -> dict[str, Any]:
    """Pages coded and opened again: within half a code (fp8: half of its last bit) of what they were."""
    case = _drawn(seed, lengths)
    pages = _full(case)
    count, kv_heads = len(case.k_pages), case.kv_heads
    rows = case.page // 2 if name == "int4" else case.page
    stored = np.zeros((count, kv_heads, rows, 64), codes.DTYPES[name])
    scales = np.zeros((count, kv_heads, codes.scales_width(name, case.page, 64)), np.float32)
    quantize = _jitted(kernels.quantize_pages, implementation, head_dim=64)
    packed = quantize(stored, stored, scales, case.k_pages, case.v_pages, pages, pages)
    scratch = np.zeros(case.k_pages.shape, jnp.bfloat16)
    opened, chosen = _served("open_pages", implementation, scratch, scratch, *packed, pages, pages, head_dim=64)
    view = coded.Coded(case, name, *(np.asarray(x) for x in packed))
    worst = 0.0
    for head in range(kv_heads):
        for got, decoded, pool, axis in (
            (opened[0], view.keys(pages, head), case.k_pages, 1),
            (opened[1], view.values(pages, head), case.v_pages, 2),
        ):
            worst = max(worst, compared(got[pages, head], decoded, 1e-2)["max_error"])
            given = pool[pages, head].astype(np.float64)
            reach = (np.ptp(given, axis=axis) / 30 if name == "int4" else np.abs(given).max(axis) / 254) * 1.01
            if name == "fp8":
                reach = np.abs(given).max(axis) / 16
            if (np.abs(decoded - given) > np.expand_dims(reach, axis) + 1e-6).any():
                raise AssertionError("a value is further than half a code from what it was")
    return {"backend": chosen, "max_error": worst}
