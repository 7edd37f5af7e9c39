"""Random JSON schemas whose every instance is short, so that any model finishes one."""

from __future__ import annotations

import random
import string


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = [_integer, _enum, _text, _boolean, _pattern, _null]
    kinds += [_object, _array, _union] if depth else []
    return rng.choice(kinds)(rng, depth)


def random_object(rng: random.Random, depth: int = 2) -> dict:
    """A schema of objects, as tools and response formats use."""
    return _object(rng, depth)


def _integer(rng: random.Random, depth: int) -> dict:
    low = rng.randint(-999, 999)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _enum(rng: random.Random, depth: int) -> dict:
    return {"enum": rng.sample(["red", "grün", "日本", 7, 3.5, None, True, "a b", "quote\"d"], rng.randint(1, 5))}


def _text(rng: random.Random, depth: int) -> dict:
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def _boolean(rng: random.Random, depth: int) -> dict:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> dict:
    return {"type": "null"}


def _pattern(rng: random.Random, depth: int) -> dict:
    return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "^(on|off)$"])}


def _object(rng: random.Random, depth: int) -> dict:
    names = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
    properties = {name: random_schema(rng, depth - 1) for name in names}
    required = [name for name in properties if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> dict:
    low = rng.randint(0, 2)
    items = random_schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> dict:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
