"""Who was given which openings of prompts: the choice of a replica, without Ray.

A prompt's opening is cut into blocks, and each block is known by a hash of everything up to its end, so two prompts
share exactly the blocks of their common prefix. The idea is that of prefix-aware routers such as SGLang's
(arXiv 2312.07104, section 3); what is remembered here is what was sent, not what a replica still has.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json

BLOCK_BYTES = 64
MOST_BLOCKS = 4096
OPENING = ("tools", "instructions", "messages", "prompt", "input")
"""Fields of a body that make its prompt, in the order in which they do."""


def leads(body: bytes) -> tuple[int, ...]:
    """Hashes of the blocks of a request's prompt; empty where it is short or no valid JSON."""
    try:
        values = from_json(body)
    except ValueError:
        return ()
    if not isinstance(values, dict):
        return ()
    text = b"".join(_text(values[name]) for name in OPENING if values.get(name))
    digest, found = hashlib.blake2b(digest_size=8), []
    for start in range(0, min(len(text), MOST_BLOCKS * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        digest.update(text[start : start + BLOCK_BYTES])
        found.append(int.from_bytes(digest.digest()))
    return tuple(found)


def _text(value: Any) -> bytes:
    """JSON grows at its end as a conversation, a text or a list of tokens does."""
    return to_json(value, inf_nan_mode="constants")


class PrefixMap[R]:
    """Blocks that replicas were given, the latest `most` of each."""

    def __init__(self, most: int = 200_000):
        self._most = most
        self._held: dict[R, OrderedDict[int, None]] = {}

    def matched(self, replica: R, blocks: Sequence[int]) -> int:
        """How many of the first blocks `replica` was given."""
        held = self._held.get(replica, {})
        return next((place for place, block in enumerate(blocks) if block not in held), len(blocks))

    def held(self, replica: R) -> int:
        return len(self._held.get(replica, ()))

    def add(self, replica: R, blocks: Sequence[int]) -> None:
        held = self._held.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the first block is the last to be forgotten
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._most:
            held.popitem(last=False)

    def keep(self, replicas: Collection[R]) -> None:
        """Forgets all other replicas."""
        self._held = {replica: held for replica, held in self._held.items() if replica in replicas}


def rank[R](blocks: Sequence[int], loads: Mapping[R, int], held: PrefixMap[R], imbalance: int) -> list[R]:
    """Replicas in the order in which they should be asked.

    First comes who holds most of the prefix, unless it has over `imbalance` requests more than the idlest one;
    then the idler ones, and of these who holds least, so that new prefixes spread.

    Args:
        loads: requests that each replica works on.
    """
    order = sorted(loads, key=lambda replica: (loads[replica], held.held(replica)))
    matches = {replica: held.matched(replica, blocks) for replica in order}
    best = max(order, key=matches.__getitem__)
    if matches[best] and loads[best] - loads[order[0]] <= imbalance:
        order.remove(best)
        order.insert(0, best)
    return order
