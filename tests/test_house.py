"""The house rules that a program can see: imports go one way, files can be held in the head."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room may import those after it; errors and config are importable from everywhere.
ROOMS = ("cli", "evaluation", "serve", "engine", "sparsity", "cache", "models", "parallel")
NO_JAX = (
    *("engine/scheduler.py", "engine/sequence.py", "cache/allocator.py"),
    *(f"cache/tiers/{name}.py" for name in ("record", "host", "disk", "store")),
    *("config.py", "errors.py", "sparsity/policy.py", "sparsity/names.py", "sparsity/kinds.py", "sparsity/valid.py"),
)


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "sparsejax" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_downwards_only(name):
    allowed = {*ROOMS[ROOMS.index(name) :], "errors", "config"}
    for path in sorted((ROOT / "sparsejax" / name).rglob("*.py")):
        ours = {room(module) for module in imported(path) if module.startswith("sparsejax.")}
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {sorted(ours - allowed)}"
        assert not {"train", "scripts", "tests"} & {module.split(".")[0] for module in imported(path)}


def test_kernels_know_arrays_only():
    for path in sorted((ROOT / "pallas_kernels").rglob("*.py")):
        assert not any(module.split(".")[0] in ("sparsejax", "train") for module in imported(path)), path


@pytest.mark.parametrize("name", NO_JAX)
def test_what_decides_imports_no_jax(name):
    assert not {"jax", "jaxtyping", "flax"} & {m.split(".")[0] for m in imported(ROOT / "sparsejax" / name)}


def test_files_can_be_held_in_the_head():
    sizes = {
        path: len(path.read_text().splitlines())
        for folder in ("sparsejax", "pallas_kernels", "train", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert median(sizes.values()) < 150
    assert max(sizes.values()) <= 500
