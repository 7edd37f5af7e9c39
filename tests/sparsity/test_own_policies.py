"""The example of scores of one's own runs, and each part of a policy does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/own_policies.py"


def test_the_example_holds_and_reads_less(capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = re.findall(r"^(.*): reads (\S+) of (\S+) pages, writes '.+'$", capsys.readouterr().out, re.M)
    found = {name: (float(read), float(held)) for name, read, held in lines}
    (everything, prompt), (few, kept), (paged, whole), (both, left) = found.values()
    assert list(found) == ["everything", "keys of small norm", "pages near the query", "both"]
    assert everything == prompt == whole and few == kept == left < prompt
    assert paged == both == 160 / 32 < kept
