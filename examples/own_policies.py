"""A keep and a select of one's own, composed with a codec: python examples/own_policies.py

A score is a function of arrays; larger stays, or is read first. Budgets, pinned tokens, batches and bytes are not its
concern. Engines compile it in, so it is declared when they start, and a request names it by passing the same policy.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax import Engine, SamplingParams
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.keep import View
from sparsejax.sparsity.keep.view import by_token
from sparsejax.sparsity.kinds import Select
from sparsejax.sparsity.policy import SparsityConfig
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select import Query


def small_keys(view: View) -> Float[Array, "K U"]:
    """Keys of small norm attract attention (Devoto et al., arXiv 2406.11430)."""
    return by_token(view, lambda k, v: -jnp.linalg.norm(k, axis=-1), view.k_pages.shape[1])


def near_the_middle(query: Query, policy: PolicyRows) -> Float[Array, "B K S"]:
    """The score of the query with the middle of each page's bounds: Quest's bound without its width, [B, K, S]."""
    low, high = jnp.split(query.bounds[query.page_ids[:, 0]], 2, axis=-1)  # [B, S, K, D]
    heads = query.q.reshape(*query.q.shape[:1], low.shape[2], -1, low.shape[3])  # [B, K, G, D]
    return jnp.einsum("bkgd,bskd->bkgs", heads, (low + high) / 2).max(2)


KEEP = Keep.scored(small_keys, budget=320)
READ = {"select": Select.scored(near_the_middle, bounds=True), "budget": 160, "recent": 16}
POLICIES = {
    "everything": SparsityConfig(codec="int8"),
    "keys of small norm": SparsityConfig(keep=KEEP, codec="int8"),
    "pages near the query": SparsityConfig(**READ, codec="int8"),
    "both": SparsityConfig(keep=KEEP, **READ, codec="int8"),
}
SMALL = dict(max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=128, num_decode_steps=1, warmup="lazy")
LINES = [f"key {number}: {number * 7919 % 1000:03d};" for number in range(60)]
PROMPT = " ".join(LINES) + "\nQ: What is the value of key"


def main() -> None:
    with Engine(sparsity=list(POLICIES.values()), **SMALL) as engine:
        for name, policy in POLICIES.items():
            before = engine.stats()
            (output,) = engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=8, sparsity=policy))
            after = engine.stats()
            held, read, steps = (
                after[key] - before[key] for key in ("decode_pages_held", "decode_pages_read", "decode_queries")
            )
            print(f"{name}: reads {read / steps:.1f} of {held / steps:.1f} pages, writes {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
