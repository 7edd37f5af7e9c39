"""The visibility rule of coded pages applied to a whole sequence at once, with attention in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import codes
from sparsejax.models.decoder import Decoder


@dataclass(frozen=True)
class Flat:
    """The tokens of one sequence."""

    tokens: jnp.ndarray
    positions: jnp.ndarray


class SealedReference:
    """A KV object without pages: every query reads its own page raw and whole earlier pages as coded.

    `given` is the probability that all queries gave to each token, ``[K, T]`` of every layer.
    """

    def __init__(self, codec: str, page_size: int, windows: tuple):
        self.codec, self.page_size, self.windows = codec, page_size, windows
        self.given: list[np.ndarray] = []

    def attend(self, layer, q, k, v, batch, rotate):
        q, k = rotate(q), rotate(k)
        coded_k, coded_v = self.coded(k, v)
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        coded_k, coded_v, k, v = (x.repeat(groups, axis=1) for x in (coded_k, coded_v, k, v))
        out, given = np.zeros(q.shape), np.zeros((k.shape[1], len(q)))
        for t in range(len(q)):
            page = t // self.page_size * self.page_size
            first = 0 if self.windows[layer] is None else max(0, t + 1 - self.windows[layer])
            keys = np.concatenate([coded_k[:page], k[page : t + 1]])[first:]
            values = np.concatenate([coded_v[:page], v[page : t + 1]])[first:]
            scores = np.einsum("shd,hd->hs", keys, q[t]) * q.shape[2] ** -0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            given[:, first : t + 1] += weights
            out[t] = np.einsum("hs,shd->hd", weights, values)
        self.given.append(given.reshape(-1, groups, len(q)).sum(1))
        return jnp.asarray(out, jnp.float32), self

    def coded(self, k, v) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of whole pages through the codec, [tokens, K, D]."""
        tokens, heads, dim = k.shape
        pages = tokens // self.page_size
        paged = [x[: pages * self.page_size].reshape(pages, self.page_size, heads, dim).swapaxes(1, 2) for x in (k, v)]
        rows = self.page_size // (2 if self.codec == "int4" else 1)
        pool = jnp.zeros((pages, heads, rows, dim), codes.DTYPES[self.codec])
        scales = jnp.zeros((pages, heads, codes.scales_width(self.codec, self.page_size, dim)), k.dtype)
        ids = jnp.arange(pages, dtype=jnp.int32)
        stored = pallas_kernels.quantize_pages(
            pool, pool, scales, *paged, ids, ids, head_dim=dim, implementation="reference"
        )
        return tuple(
            np.asarray(x, np.float64).swapaxes(1, 2).reshape(-1, heads, dim) for x in codes.decode_pages(*stored, dim)
        )


def read(model, codec: str, page_size: int, tokens: list[int]) -> tuple[jnp.ndarray, SealedReference]:
    """Hidden states of a sequence, and the KV object that it was read with."""
    batch = Flat(jnp.asarray(tokens, jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32))
    kv = SealedReference(codec, page_size, model.config.windows)
    return Decoder(model.config, model.dtype).apply({"params": model.params}, batch, kv)


def next_logprobs(model, codec: str, page_size: int, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token of a sequence."""
    decoder = Decoder(model.config, model.dtype)
    hidden, _ = read(model, codec, page_size, tokens)
    logits = np.asarray(decoder.apply({"params": model.params}, hidden, method="logits"), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
