"""Initialisation with a retrieval circuit in place: induction heads that training refines instead of discovering.

From random weights a small model needs millions of tokens to find that "look for what was asked for, read what
follows it" lowers the loss. Here that is built into the initial weights. Layer 0 has a head that looks two tokens back
and one that looks one token back; both note what stood there. Layer 1 has heads that look for places whose note (two
back: how documents state facts) equals the current token and copy those places' tokens to the output, and a head that
does the same for the other note (one back: how answers state them) with the opposite sign, so that what was said
already is not said again. All weights stay trainable, and everything else is random.
"""

from __future__ import annotations

import numpy as np

from train.model import Params, Shape

CONSTANT = 6.0  # a component that every embedding shares, so that a head can look at positions alone
STATED, SAID = 2, 1  # tokens from a key to its value in a fact and in an answer


def plant(shape: Shape, params: Params, seed: int) -> Params:
    """Parameters like `params` with the circuit built in.

    The residual stream has a constant (dimension 0), a content half (the token) and a note half (the token two back,
    the token one back turned by a random rotation, and later the answer).
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
    turn = np.linalg.qr(rng.standard_normal((len(note), len(note))))[0]
    for name in ("layers_0", "layers_1"):
        tree[name]["o"] *= 0.2
        tree[name]["down"] *= 0.2
    _look_back(shape, tree["layers_0"], 0, STATED, content, note, np.eye(len(note)))
    _look_back(shape, tree["layers_0"], shape.num_kv_heads - 1, SAID, content, note, 0.7 * turn)
    _compare_and_copy(shape, tree["layers_1"], content, note, turn)
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


def _look_back(
    shape: Shape, layer: dict, group: int, back: int, content: np.ndarray, note: np.ndarray, write: np.ndarray
) -> None:
    """The last head of a group looks `back` tokens back and notes `write @ content` of what stands there."""
    pairs, groups = shape.head_dim // 2, shape.num_heads // shape.num_kv_heads
    fast = np.arange(10)
    frequency = shape.rope_theta ** (-fast / pairs)
    strength = np.sqrt(np.where(fast == 0, 2.0, 1.0)) * 2.0
    qkv, out = layer["qkv"], layer["o"]
    qkv[group] = 0.0
    qkv[group, groups, fast, 0] = strength
    for head in range(groups):
        offset = back if head == groups - 1 else 1 + 2 * group + head
        qkv[group, head, fast, 0] = strength * np.cos(offset * frequency)
        qkv[group, head, pairs + fast, 0] = -strength * np.sin(offset * frequency)
    lanes = np.arange(len(note))
    qkv[group, groups + 1, lanes, content] = 1.0
    out[:, group, groups - 1] = 0.0
    out[np.ix_(note, [group], [groups - 1], lanes)] = write[:, None, None, :]


def _compare_and_copy(shape: Shape, layer: dict, content: np.ndarray, note: np.ndarray, turn: np.ndarray) -> None:
    """Heads compare the current token with notes, each group on its own share of the content, and copy what they find.

    Keys are compared in the slow rotary pairs, which distance leaves alone. The first head of the last group looks for
    what was said already and takes it away from the output.
    """
    pairs, groups = shape.head_dim // 2, shape.num_heads // shape.num_kv_heads
    slow = np.arange(pairs // 2, pairs)
    places = np.concatenate([slow, pairs + slow])
    qkv, out = layer["qkv"], layer["o"]
    lanes = np.arange(len(note))
    for group in range(shape.num_kv_heads):
        share = (np.arange(len(places)) + group * len(places)) % len(content)
        qkv[group] = 0.0
        qkv[group, :groups, places, content[share]] = 3.0
        qkv[group, groups, places, note[share]] = 3.0
        qkv[group, groups + 1, lanes, content] = 1.0
        out[:, group, groups - 1] = 0.0
        out[note, group, groups - 1, lanes] = 1.5
        if group == shape.num_kv_heads - 1 and groups > 1:
            qkv[group, 0] = 0.0
            qkv[np.ix_([group], [0], places, content)] = 3.0 * turn[share]
            out[:, group, 0] = 0.0
            out[note, group, 0, lanes] = -1.5
