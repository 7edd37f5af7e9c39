"""Initialisation with a retrieval circuit in place: an induction head that training refines instead of discovering.

From random weights a small model needs millions of tokens to find that "look for what was asked for, read what
follows it" lowers the loss. Here two facts are built into the initial weights: in layer 0 a head that looks two
tokens back and notes what stood there; in layer 1 heads that look for the place whose note equals the current token
and copy that place's own token to the output. All weights stay trainable, and everything else is random.
"""

from __future__ import annotations

import numpy as np

from train.model import Params, Shape

CONSTANT = 6.0  # a component that every embedding shares, so that a head can look at positions alone
OFFSET = 2


def plant(shape: Shape, params: Params, seed: int) -> Params:
    """Parameters like `params` with the circuit built in.

    The residual stream has a constant (dimension 0), a content half (the token) and a note half (the token two back,
    and later the answer). Keys are compared in the slow rotary pairs, which distance leaves alone; positions in the
    fast pairs.
    """
    rng = np.random.default_rng(seed)
    tree = {name: _copy(value) for name, value in params.items()}
    half = shape.hidden_size // 2
    width = min(half - 1, shape.head_dim)
    content, note = np.arange(1, 1 + width), np.arange(1 + half, 1 + half + width)
    note = note[note < shape.hidden_size]
    content = content[: len(note)]
    embed = tree["embed"]
    embed[:, 0] = CONSTANT
    embed[:, half + 1 :] *= 0.2
    _look_back(shape, tree["layers_0"], content, note)
    _compare_and_copy(shape, tree["layers_1"], content, note)
    tree["lm_head"] = 0.02 * rng.standard_normal(embed.shape)
    tree["lm_head"][:, note] += 0.15 * embed[:, content]
    return {name: _freeze(value) for name, value in tree.items()}


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return {name: _copy(one) for name, one in value.items()}
    return np.array(value, np.float64)


def _freeze(value: object) -> object:
    if isinstance(value, dict):
        return {name: _freeze(one) for name, one in value.items()}
    return np.asarray(value, np.float32)


def _look_back(shape: Shape, layer: dict, content: np.ndarray, note: np.ndarray) -> None:
    """Group 0 looks one and two tokens back; what stood two back is noted."""
    pairs = shape.head_dim // 2
    fast = np.arange(10)
    frequency = shape.rope_theta ** (-fast / pairs)
    strength = np.sqrt(np.where(fast == 0, 2.0, 1.0)) * 2.0
    groups = shape.num_heads // shape.num_kv_heads
    qkv, out = layer["qkv"], layer["o"]
    out *= 0.2
    layer["down"] *= 0.2
    qkv[0] = 0.0
    qkv[0, groups, fast, 0] = strength
    for head in range(groups):
        offset = OFFSET if head == groups - 1 else 1
        qkv[0, head, fast, 0] = strength * np.cos(offset * frequency)
        qkv[0, head, pairs + fast, 0] = -strength * np.sin(offset * frequency)
    lanes = np.arange(len(note))
    qkv[0, groups + 1, lanes, content] = 1.0
    out[:, 0, groups - 1] = 0.0
    out[note, 0, groups - 1, lanes] = 1.0


def _compare_and_copy(shape: Shape, layer: dict, content: np.ndarray, note: np.ndarray) -> None:
    """Every group compares the current token with notes, on its own share of the content, and copies what it finds."""
    pairs, groups = shape.head_dim // 2, shape.num_heads // shape.num_kv_heads
    slow = np.arange(pairs // 2, pairs)
    places = np.concatenate([slow, pairs + slow])
    qkv, out = layer["qkv"], layer["o"]
    out *= 0.2
    layer["down"] *= 0.2
    lanes = np.arange(len(note))
    for group in range(shape.num_kv_heads):
        share = (np.arange(len(places)) + group * len(places)) % len(content)
        qkv[group] = 0.0
        qkv[group, :groups, places, content[share]] = 3.0
        qkv[group, groups, places, note[share]] = 3.0
        qkv[group, groups + 1, lanes, content] = 1.0
        out[:, group, 0] = 0.0
        out[note, group, 0, lanes] = 1.5
