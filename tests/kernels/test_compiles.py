"""Kernels lower with plain jaxlib and, where the compilers are installed, compile within the devices'
limits."""

from __future__ import annotations

import itertools

import pytest

from pallas_kernels.aot import report, sweep
from pallas_kernels.aot.cases import Case, cases, sample

SAMPLE = tuple(sample())
ALL = tuple(cases())


def test_the_sample_covers_every_value_of_every_axis():
    for axis in ("op", "dtype", "head_dim", "page", "per_head"):
        assert {getattr(c, axis) for c in SAMPLE} == {getattr(c, axis) for c in ALL}, axis


@pytest.mark.parametrize(("platform", "case"), tuple(itertools.product(sweep.PLATFORMS, SAMPLE)), ids=str)
def test_lowers_or_declines(platform: str, case: Case):
    (line,) = sweep.lowered([case], sweep.target(platform))
    assert line.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("platform", sweep.PLATFORMS)
def test_every_case_lowers_or_declines(platform: str):
    assert [problem for line in sweep.lowered(ALL, sweep.target(platform)) for problem in line.problems()] == []


@pytest.mark.aot
@pytest.mark.parametrize(("platform", "case"), tuple(itertools.product(sweep.PLATFORMS, SAMPLE)), ids=str)
def test_compiles_within_limits(platform: str, case: Case):
    """All cases: `scripts/compile_check.py`, which takes the better part of an hour."""
    target = sweep.target(platform)
    reason = target.available()
    assert reason is None, reason
    for device in target.TARGETS:
        (line,) = sweep.compiled([case], target, device)
        assert line.problems() == []


def test_only_float32_is_left_to_xla_on_hopper():
    lines = sweep.lowered([c for c in SAMPLE if c.dtype == "f32"], sweep.target("cuda"))
    assert all("would be rounded to tf32" in line.declined for line in lines)


KERNEL = report.Kernel("k", {"registers": 200, "spilled bytes": 8}, {"registers": 255, "spilled bytes": 0})
REPORT = report.Report((KERNEL,), 0.5, 1.25, 0, 0)


def test_a_spill_is_a_problem():
    (problem,) = report.Line("case", "device", REPORT).problems()
    assert problem == "case on device: k: 8 spilled bytes, at most 0 allowed"


def test_the_table_keeps_the_sections_of_other_devices():
    lines = [report.Line("a", "d", REPORT), report.Line("b", "d", declined="float32")]
    first = report.merged("", {"d": report.table(lines)})
    both = report.merged(first, {"c": "text"})
    assert both.index("## c") < both.index("## d")
    assert "| a | 200 | 8 | 1.2 |" in both and "| b |  |  |  | XLA: float32 |" in both
    assert report.merged(both, {"c": "other"}).count("## ") == 2


def test_the_table_keeps_the_lines_of_other_cases():
    first = report.merged("", {"d": report.table([report.Line("a", "d", REPORT), report.Line("b", "d", REPORT)])})
    again = report.merged(first, {"d": report.table([report.Line("b", "d", declined="float32")])})
    assert "| a | 200 | 8 | 1.2 |" in again and "| b |  |  |  | XLA: float32 |" in again and again.count("| b ") == 1
    back = report.merged(again, {"d": report.table([report.Line("b", "d", REPORT)])})
    assert "| b | 200 | 8 | 1.2 |" in back


def test_the_summary_counts_cases_and_gives_the_most_of_each_resource():
    lines = [report.Line("a", "d", REPORT), report.Line("b", "d", declined="float32"), report.Line("c", "d", error="E")]
    document = report.merged("", {"d: op": report.table(lines)})
    assert "| d | `op` | 1 | 1 | 1 | 200 registers, 8 spilled bytes |" in report.summary(document)
    page = f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n"
    assert report.placed(page, "new\n") == page.replace("old", "new")
