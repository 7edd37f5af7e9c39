"""Tables from stored evaluations, and documents as text."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from benchmarks import evaluation
from document import main

from sparsejax.evaluation.statistics import paired_difference, wilson


def cell(case: str, right: int, dense: int | None = None, samples: int = 16) -> dict[str, Any]:
    outcomes = [index < right for index in range(samples)]
    lost = None if dense is None else paired_difference(outcomes, [index < dense for index in range(samples)])
    return {
        **{"case": case, "length": 1024, "right": right, "samples": samples, "accuracy": right / samples},
        **{"interval": wilson(right, samples), "outcomes": "".join("01"[one] for one in outcomes)},
        **{"difference": lost and lost[0], "difference_interval": lost and lost[1:]},
    }


def stored() -> dict[str, Any]:
    def policy(name: str, read: float, *cells: dict[str, Any]) -> dict[str, Any]:
        kv = {"length": 1024, "held_bytes": 4e6, "read_bytes": read, "bounds_bytes": 5e5}
        return {"policy": name, "kv": [kv], "cells": list(cells)}

    dense = policy("dense", 4e6, cell("kv", 16), cell("qa", 1), cell("niah_single", 16))
    some = policy("streaming 0.25", 1e6, cell("kv", 12, 16), cell("niah_single", 3, 16))
    more = policy("streaming 0.5", 2e6, cell("kv", 16, 16), cell("niah_single", 8, 16))
    cliffs = {"dense": None, "streaming": None, "quest": {"policy": "quest 0.5", "saving": 1.9}}
    return {
        **{"model": "seed 1", "policies": [dense, some, more], "cliffs": cliffs},
        "not_learned": [["qa", 1024]],
    }


def test_a_policy_is_shown_with_its_worst_cell() -> None:
    head, _, dense, some, more = evaluation.policy_table([stored()]).splitlines()
    assert "`kv` 1024 | `niah_single` 1024 | loses most on" in head and "qa" not in head
    assert dense == "| dense | 16 of 16 | 16 of 16 |  |  | 4.00 | 4.50 |"
    assert some.startswith("| streaming 0.25 | 12 of 16 | 3 of 16 | `niah_single` | -81 [")
    assert more.endswith("| 4.00 | 2.50 |")


def test_cliffs_and_failures_say_what_is_missing() -> None:
    table = evaluation.cliff_table([stored()])
    assert "| `quest 0.5` | 1.90 times fewer |" in table and "| `streaming` | no budget that was tried |" in table
    first, second, *_ = evaluation.failure_table([stored()]).splitlines()[2:]
    assert first.endswith("| streaming 0.25: 3 of 16, streaming 0.5: 8 of 16 |")
    assert second.endswith(f"| {evaluation.MISSING} |")


def test_models_of_other_seeds_stand_side_by_side() -> None:
    other = stored() | {"model": "seed 2"}
    other["policies"][0]["cells"][0] = cell("kv", 12)
    lines = evaluation.spread_table([stored(), other]).splitlines()
    assert "| seed 1 | seed 2 | range, points |" in lines[0]
    assert lines[2].startswith("| `kv` | 1024 | 100.0 [") and lines[2].endswith("| 25.0 |")


def test_proxies_show_the_worst_layer() -> None:
    one = {"policy": "quest", "recall": [0.9, 0.5], "error": [0.1, 0.3], "agreement": 0.75, "first_divergence": None}
    one["divergence"] = {"mean": 0.01, "p99": 0.2, "max": 1.5}
    table = evaluation.proxy_table([[{"length": 64, "policies": []}, {"length": 1024, "policies": [one]}]])
    assert "| quest | 0.700 | 0.500 (layer 1) | 0.200 | 0.01 | 0.2 | 1.5 | 75% | never |" in table


def test_a_document_is_printed_with_all_its_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["document.py", "kv_dense_turns", "128", "3"])
    main()
    assert capsys.readouterr().out.count("Q: What is the value of") == 4
