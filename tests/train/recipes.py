"""A recipe that trains in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from train.recipe import Recipe, load_recipe

TINY = {
    "seed": 3,
    "max_position": 128,
    "planted": True,
    "warmup": 2,
    "shape": {
        **{"num_layers": 2, "hidden_size": 64, "intermediate_size": 64},
        **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    },
    "stages": [
        {"steps": 24, "length": 48, "rows": 4, "micro_rows": 2, "rate": 1e-2},
        {"steps": 24, "length": 48, "rows": 4, "micro_rows": 2, "rate": [1e-2, 1e-3], "gap_share": 0.5},
    ],
}


def tiny(folder: Path) -> Recipe:
    return write(folder, TINY)


def calm(folder: Path) -> Recipe:
    """The same with float32 products and a low rate, so that rounding does not grow from step to step."""
    stages = [stage | {"rate": 1e-3} for stage in TINY["stages"]]
    return write(folder, TINY | {"shape": TINY["shape"] | {"dot_dtype": "float32"}, "stages": stages})


def write(folder: Path, recipe: dict) -> Recipe:
    """Writes a recipe to ``folder/recipe.json`` and reads it back."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return load_recipe(path)
