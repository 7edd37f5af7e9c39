"""What a result file says about the machine it was taken on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def describe_machine() -> dict:
    """Processor, its matrix instructions, cores, memory and the Python version; no names, no paths."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.M)
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    meminfo = Path("/proc/meminfo")
    memory = re.search(r"^MemTotal:\s+(\d+)", meminfo.read_text(), re.M) if meminfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
    }
