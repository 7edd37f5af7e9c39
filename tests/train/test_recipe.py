"""Recipes: the shipped ones load, and a wrong field is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsejax.errors import ConfigError
from train.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "train" / "recipes").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.total_steps == sum(stage.steps for stage in recipe.stages) > 0
    assert all(stage.rows % stage.micro_rows == 0 for stage in recipe.stages)


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"sead": 1, "stages": []}))
    with pytest.raises(ConfigError, match="sead"):
        load_recipe(path)
