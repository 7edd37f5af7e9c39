"""How commands print: sizes, aligned tables, and streamed text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO


def size(count: float) -> str:
    """A number of bytes as people read it: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shorten(text: str, width: int = 72) -> str:
    """One line of at most ``width`` characters; the middle gives way, so both ends stay readable."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    tail = (width - 5) // 2
    return f"{line[: width - 5 - tail]} ... {line[-tail:]}"


def table(rows: Iterable[Sequence[Any]], *, indent: str = "  ") -> str:
    """Left-aligned columns as wide as their widest cell; the last column is not padded."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = [
        indent + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def stream(deltas: Iterable[Any], out: TextIO | None = None) -> tuple[str, int, str | None]:
    """Print the text of RequestOutput deltas as it comes. Returns the text, its tokens, the finish reason."""
    out = out or sys.stdout
    text, tokens, reason = [], 0, None
    for delta in deltas:
        for part in delta.outputs:
            out.write(part.text)
            out.flush()
            text.append(part.text)
            tokens += len(part.token_ids)
            reason = part.finish_reason or reason
    return "".join(text), tokens, reason
