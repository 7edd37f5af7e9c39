"""Which layers may select for others: how much of a layer's attention lies in the pages that another one chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.cache.group import dense_group
from sparsejax.errors import ConfigError
from sparsejax.evaluation import proxies
from sparsejax.evaluation.watched import Recorded, Shape
from sparsejax.models.decoder import Decoder
from sparsejax.models.loaded import LoadedModel

PINNED = 2
"""Newest pages that every list holds, besides the first page."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """Dense attention over a text; of each layer so far the probability ``[Q, H, S]`` that the last Q queries give to
    each page."""

    shape: Shape = field(metadata={"static": True})
    queries: int = field(metadata={"static": True})
    pages: tuple[Array, ...] = ()

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, batch: Any, rotate: Callable[[Array], Array]
    ) -> tuple[Float[Array, "T H D"], Seen]:
        """Attention of all T tokens, as `models.decoder.KV` describes it."""
        out, recorded = Recorded(self.shape).attend(layer, q, k, v, batch, rotate)
        age = batch.positions[-self.queries :, None] - batch.positions
        window = self.shape.model.windows[layer]
        visible = (age >= 0) & (age < (window or len(k)))
        asked = rotate(q)[-self.queries :]
        weights = proxies.attention_weights(asked, recorded.keys[0], visible, self.shape.model.attn_soft_cap)
        size = self.shape.layout.page_size
        weights = jnp.pad(weights, ((0, 0), (0, 0), (0, -len(k) % size)))
        return out, replace(self, pages=(*self.pages, weights.reshape(*weights.shape[:2], -1, size).sum(-1)))


def coverage(
    model: LoadedModel, texts: Sequence[Sequence[int]], *, share: float, page_size: int, queries: int
) -> Float[np.ndarray, "L L"]:
    """How much of the attention of layer j lies in the pages that layer i gives most to, a `share` of all pages.

    Layer i lists a query's pages by the largest probability of any head, the first and the newest ones pinned, as a
    filter layer does; entry (i, j) is the mean over queries, heads of layer j, and texts.
    """
    decoder, found = Decoder(model.config, model.dtype), []
    for text in texts:
        if not queries < len(text) <= model.config.max_position_embeddings:
            raise ConfigError(
                f"a text has {len(text)} tokens: give more than the {queries} that ask, and at most the "
                f"{model.config.max_position_embeddings} that the model takes."
            )
        pages = -(-len(text) // page_size)
        layout = dense_group(model.config, page_size, model.dtype, pages + 1, jax.default_backend()).layout
        seen = _look(decoder, Seen(Shape(model.config, layout), queries), model.params, jnp.asarray(text, jnp.int32))
        found.append(shared_mass(np.stack([np.asarray(one, np.float64) for one in seen]), max(1, int(share * pages))))
    return np.mean(found, axis=0)


@partial(jax.jit, static_argnums=(0, 1))
def _look(decoder: Decoder, seen: Seen, params: Any, tokens: Array) -> tuple[Array, ...]:
    batch = SimpleNamespace(tokens=tokens, positions=jnp.arange(len(tokens)))
    return decoder.apply({"params": params}, batch, seen)[1].pages


def shared_mass(mass: Float[np.ndarray, "L Q H S"], budget: int) -> Float[np.ndarray, "L L"]:
    """`coverage` of one text, from the probability of its pages."""
    scores = mass.max(2)
    scores[..., :1] = scores[..., -PINNED:] = np.inf
    listed = np.zeros(scores.shape, bool)
    np.put_along_axis(listed, np.argsort(-scores, axis=-1, kind="stable")[..., :budget], True, axis=-1)
    return np.einsum("iqs,jqhs->ij", listed, mass) / (mass.shape[1] * mass.shape[2])


def best_filters(share: Float[np.ndarray, "L L"], count: int) -> tuple[int, ...]:
    """`count` layers, layer 0 among them, chosen one by one for the largest coverage of all layers by the nearest
    filter layer at or before them. A filter layer reads its own list and so counts as it covers itself.

    Raises:
        ConfigError: fewer than one, or more than there are layers.
    """
    layers = range(len(share))
    if not 1 <= count <= len(share):
        raise ConfigError(f"{count} filter layers: the model has {len(share)} layers, give 1 to {len(share)}.")
    chosen = {0}
    while len(chosen) < count:
        rest = [layer for layer in layers if layer not in chosen]
        chosen.add(max(rest, key=lambda layer: covered(share, chosen | {layer})))
    return tuple(sorted(chosen))


def covered(share: Float[np.ndarray, "L L"], filters: set[int] | Sequence[int]) -> float:
    """The mean over layers of what the nearest filter layer at or before each covers of it."""
    nearest = [max(one for one in filters if one <= layer) for layer in range(len(share))]
    return float(np.mean([share[one, layer] for layer, one in enumerate(nearest)]))
