"""The visibility rule of coded pages applied to a whole sequence at once, with attention in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import codes
from pallas_kernels.deltakv import vectors
from sparsejax.models.decoder import Decoder
from tests.kernels import deltakv_oracle


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
        coded_k, coded_v = self.stored(layer, k, v, rotate)
        q, k = rotate(q), rotate(k)
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

    def stored(self, layer, k, v, rotate) -> tuple[np.ndarray, np.ndarray]:
        """Rotated keys and values of whole pages of a layer as they are read back, [tokens, K, D]."""
        return self.coded(rotate(k), v)

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


class LatentReference(SealedReference):
    """The same under DeltaKV: layers of the compressor through the NumPy oracle of its code, others as `codec`."""

    def __init__(self, compressor, codec: str, windows: tuple):
        super().__init__(codec, compressor.grid.page_size, windows)
        self.compressor = compressor

    def stored(self, layer, k, v, rotate):
        if layer not in self.compressor.layers:
            return super().stored(layer, k, v, rotate) if self.codec != "dense" else (rotate(k), v)
        weights, (tokens, heads, dim), grid = self.compressor.layers[layer], k.shape, self.compressor.grid
        grid = replace(grid, latents=self.compressor.codecs.get(layer, grid.latents))
        whole = tokens // self.page_size * self.page_size
        x = np.asarray(vectors(k, v, weights["g"].shape[0]), np.float64)
        read, _ = deltakv_oracle.read(weights, grid, x[:whole], dim)
        read = np.concatenate([read, x[whole:]]).reshape(tokens, heads, 2, dim)
        return np.asarray(rotate(jnp.asarray(read[:, :, 0], jnp.float32)), np.float64), read[:, :, 1]


def read(model, kv: SealedReference, tokens: list[int]) -> tuple[jnp.ndarray, SealedReference]:
    """Hidden states of a sequence that is read with `kv`, and `kv` afterwards."""
    batch = Flat(jnp.asarray(tokens, jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32))
    return Decoder(model.config, model.dtype).apply({"params": model.params}, batch, kv)


def next_logprobs(model, kv: SealedReference, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token of a sequence."""
    decoder = Decoder(model.config, model.dtype)
    hidden, _ = read(model, kv, tokens)
    logits = np.asarray(decoder.apply({"params": model.params}, hidden, method="logits"), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
