"""What `import sparsejax` promises: instant, no JAX, no extra, and every public name resolves."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparsejax

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ("jax", "flax", "transformers", "torch", "numpy", "grpc", "fastapi", "ray", "xxhash")


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter that runs ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_import_is_light():
    loaded = modules_after("import sparsejax, sparsejax.errors, sparsejax.config, sparsejax.cli")
    assert not loaded.intersection(HEAVY)


def test_engine_needs_no_extra():
    """The engine imports with the optional packages hidden."""
    hide = (
        "import sys\nfor m in ('grpc','fastapi','uvicorn','ray','xxhash','torch','llguidance','pytest'):"
    )
    modules_after(f"{hide}\n    sys.modules[m] = None\nfrom sparsejax import *")


@pytest.mark.parametrize("name", sparsejax.__all__)
def test_public_names_resolve(name):
    assert getattr(sparsejax, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        sparsejax.Enigne  # noqa: B018


def test_constraints_pin_every_core_requirement():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version and "/" not in line, f"not an exact version: {line}"
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
