"""What a deviceless compilation reports, and the table of many of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

HEADER = """# Compiled kernels

Written by `scripts/compile_check.py`; every kernel was compiled for the device named, on a machine without
it. Nothing here says how fast a kernel runs.
"""

MARKS = ("<!-- compiled -->", "<!-- /compiled -->")  # where the summary goes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what it takes of each resource and the most it may take, resources by name.

    On a GPU: registers per thread, spilled bytes, bytes of shared memory per block. On a TPU: bytes of VMEM.
    """

    name: str
    resources: Mapping[str, int]
    limits: Mapping[str, int]

    def problems(self) -> list[str]:
        """Why this kernel is not acceptable; empty if it is."""
        return [
            f"{self.name}: {self.resources[name]} {name}, at most {limit} allowed"
            for name, limit in self.limits.items()
            if self.resources.get(name, 0) > limit
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program: its kernels, seconds to lower and to compile, temporary and aliased bytes,
    optimized text."""

    kernels: tuple[Kernel, ...]
    lower_seconds: float
    compile_seconds: float
    temporary: int
    aliased: int
    text: str = dataclasses.field(repr=False, default="")

    def problems(self) -> list[str]:
        return [problem for kernel in self.kernels for problem in kernel.problems()]


@dataclasses.dataclass(frozen=True)
class Line:
    """What became of one case on one target: a report, why the backend declined it, or an error."""

    case: str
    target: str
    report: Report | None = None
    declined: str | None = None
    error: str | None = None

    def problems(self) -> list[str]:
        if self.error is not None:
            return [f"{self.case} on {self.target}: {self.error}"]
        return [f"{self.case} on {self.target}: {p}" for p in (self.report.problems() if self.report else ())]

    def cells(self, resources: Sequence[str]) -> list[str]:
        """The row of the table; programs of several kernels show each kernel's value."""
        if self.report is None:
            return [
                self.case,
                *("" for _ in resources),
                "",
                f"XLA: {self.declined}" if self.declined else str(self.error),
            ]
        values = [
            " + ".join(f"{kernel.resources.get(name, 0):,}" for kernel in self.report.kernels) for name in resources
        ]
        return [self.case, *values, f"{self.report.compile_seconds:.1f}", "; ".join(self.report.problems())]


def table(lines: Sequence[Line]) -> str:
    """Markdown table of the lines of one target."""
    resources = list(
        dict.fromkeys(r for line in lines if line.report for k in line.report.kernels for r in k.resources)
    )
    rows = [["case", *resources, "compile s", "remark"], ["---"] + ["---:"] * (len(resources) + 1) + ["---"]]
    rows += [line.cells(resources) for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def merged(document: str, sections: Mapping[str, str]) -> str:
    """`document` with the lines of these sections put in, in the places of those of the same cases."""
    kept = _sections(document)
    kept |= {name: f"\n{_joined(kept.get(name, ''), text)}\n" for name, text in sections.items()}
    body = "".join(f"## {name}\n{text}" for name, text in sorted(kept.items()))
    return f"{HEADER}\n{body}".rstrip() + "\n"


def summary(document: str) -> str:
    """Markdown table with a row per section of a document of `merged`: how many cases compiled, were declined or
    failed, and the most of each resource that a kernel of the section takes."""
    rows = [["device", "op", "compiled", "left to XLA", "failed", "most that a kernel takes"], ["---"] * 6]
    for title, text in _sections(document).items():
        device, op = title.split(": ")
        resources, by_case = _parsed(text)
        lines = list(by_case.values())
        compiled = [line[1:] for line in lines if line[-2]]
        declined = sum(line[-1].startswith("XLA: ") for line in lines)
        most = [
            f"{max(int(value.replace(',', '')) for line in compiled for value in line[i].split(' + ')):,} {name}"
            for i, name in enumerate(resources if compiled else ())
        ]
        counts = (len(compiled), declined, len(lines) - len(compiled) - declined)
        rows.append([device, f"`{op}`", *map(str, counts), ", ".join(most)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def placed(document: str, text: str) -> str:
    """`document` with `text` between its markers."""
    before, _, rest = document.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}"


def _parsed(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The resources of a section's table and its lines by case."""
    table = [line.strip() for line in text.splitlines() if line.startswith("|")]
    names, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in table)
    return names[1:-2], {line[0]: line for line in lines}


def _joined(old: str, new: str) -> str:
    """The table of two sections, lines of `new` before those of `old` of the same case."""
    if "|" not in old or "|" not in new:
        return new
    (before, lines), (after, more) = _parsed(old), _parsed(new)
    resources = max(before, after, key=len)  # a table of declined cases has none
    rows = [["case", *resources, "compile s", "remark"], ["---"] + ["---:"] * (len(resources) + 1) + ["---"]]
    for line in (lines | more).values():
        rows.append([line[0], *(line[1:-2] or [""] * len(resources)), *line[-2:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _sections(document: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", document, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
