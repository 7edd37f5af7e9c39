"""The DeltaKV code of a page (after arXiv 2602.08005): centers on an absolute grid, latents of what differs from them.

x_t joins the keys before rotation and the values of all KV heads of token t, in head groups [A, W], W = 2KD / A; a
group lists K then V of each of its heads. Every `stride`-th position of a sequence is a center, stored int8 (one scale
per center, head and K or V) or as it is, and read as stored. A page refers to at most `references` centers, its own and
earlier ones; a token's base b is the mean of the `neighbours` nearest of them. The others are stored as

    z = f(x) - f(b),   f(x) = skip x + down (silu(gate x) * up x),   read back as   g z + b,

with z rounded per latent channel over the page. The metric is L2 over all of x; nothing refers to a later position.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import codes
from pallas_kernels.pages import batched

type Weights = dict[str, Array]
CODECS = ("int4", "int8", "none")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What decides the code of a page beside the compressor; static.

    Attributes:
        page_size, stride: P, and the distance of centers; the stride divides the page.
        references: centers that a page may refer to.
        neighbours: references that a token's base averages.
        shortlist: earlier centers that a page looks at closely: those nearest to one of its own centers. Finding
            them costs each page P / stride products with every earlier center, a `stride**2`-th of all pairs.
        centers, latents: how they are stored: int8 or none (as they are); int4, int8 or none.
    """

    page_size: int = 32
    stride: int = 16
    references: int = 8
    neighbours: int = 1
    shortlist: int = 64
    centers: str = "int8"
    latents: str = "int4"

    def __post_init__(self) -> None:
        if self.stride < 1 or self.page_size % self.stride or self.stride == 1:
            raise ValueError(f"stride must be 2 or more and divide the page of {self.page_size}; got {self.stride}")
        if not 1 <= self.neighbours <= self.references <= 256:
            raise ValueError(
                f"1 <= neighbours <= references <= 256 must hold; got {self.neighbours} and {self.references}"
            )
        if self.shortlist < 1:
            raise ValueError(f"shortlist must be at least 1; got {self.shortlist}")
        if self.centers not in CODECS[1:] or self.latents not in CODECS:
            raise ValueError(
                f"centers must be int8 or none and latents int4, int8 or none; got {self.centers}, {self.latents}"
            )

    @property
    def own(self) -> int:
        """Centers of a page."""
        return self.page_size // self.stride

    @property
    def others(self) -> int:
        """Tokens of a page that are no centers."""
        return self.page_size - self.own

    @property
    def rows(self) -> int:
        """Rows of a page's latents as stored: two tokens to a byte in int4."""
        return -(-self.others // 2) if self.latents == "int4" else self.others

    @property
    def padded_rows(self) -> int:
        """Rows with a place for every token of a page, centers too."""
        return self.page_size // 2 if self.latents == "int4" else self.page_size


class PageCode(NamedTuple):
    """A page but for its centers: `ordinals` [R] of its references in the sequence, `index` [P - own, neighbours] into
    them, and latents z [P - own, A, C] in float32, not rounded."""

    ordinals: Int[Array, " R"]
    index: Int[Array, "O k"]
    z: Float[Array, "O A C"]


def vectors(k: Float[Array, "... K D"], v: Float[Array, "... K D"], groups: int = 1) -> Float[Array, "... A W"]:
    """x of keys before rotation and values."""
    return jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], groups, -1)


def halves(x: Float[Array, "... A W"], kv_heads: int) -> tuple[Float[Array, "... K D"], Float[Array, "... K D"]]:
    """Keys and values of x."""
    joined = x.reshape(*x.shape[:-2], kv_heads, 2, -1)
    return joined[..., 0, :], joined[..., 1, :]


def compress(weights: Weights, x: Float[Array, "... A W"]) -> Float[Array, "... A C"]:
    """f in float32. Weights are output-first: skip [A, C, W], gate_up [A, 2, F, W], down [A, C, F]."""
    x = x.astype(jnp.float32)
    inner = batched("...aw,auhw->...auh", x, weights["gate_up"])
    mixed = jax.nn.silu(inner[..., 0, :]) * inner[..., 1, :]
    return batched("...aw,acw->...ac", x, weights["skip"]) + batched("...ah,ach->...ac", mixed, weights["down"])


def expand(weights: Weights, z: Float[Array, "... A C"]) -> Float[Array, "... A W"]:
    """g z in float32; g [A, W, C] has no bias."""
    return batched("...ac,awc->...aw", z.astype(jnp.float32), weights["g"])


def through(values: Array, rounded: Array) -> Array:
    """`rounded`, with the gradient of `values` (straight through)."""
    return values + lax.stop_gradient(rounded - values)


def stored_centers(x: Float[Array, "... A W"], grid: Grid, head_dim: int) -> Float[Array, "... A W"]:
    """Centers as they are read back, in float32."""
    x = x.astype(jnp.float32)
    if grid.centers == "none":
        return x
    parts = lax.stop_gradient(x).reshape(*x.shape[:-2], -1, head_dim)
    return through(x, codes.decode(*_coded(parts, "int8", -1)).reshape(x.shape))


def stored_latents(z: Float[Array, "*S O A C"], grid: Grid) -> Float[Array, "*S O A C"]:
    """Latents as they are read back, in float32: a scale (and zero in int4) per page and channel."""
    if grid.latents == "none":
        return z
    parts = lax.stop_gradient(jnp.moveaxis(z, -3, -2))
    read = codes.decode(*_coded(parts, grid.latents, -2))[..., : z.shape[-3], :]
    return through(z, jnp.moveaxis(read, -2, -3))


def filled(per_token: Array, count: int) -> Array:
    """[.., O, C] with zeros for tokens O to `count`."""
    padding = ((0, 0),) * (per_token.ndim - 2) + ((0, count - per_token.shape[-2]), (0, 0))
    return jnp.pad(per_token, padding)


def _coded(values: Array, codec: str, axis: int) -> tuple[Array, str, int, Array, Array | None]:
    """The arguments of `codes.decode` for values as stored; scales in bfloat16, int4 with an even number of rows."""
    coded, scale, zero = codes.encode(values, codec, axis, jnp.bfloat16)
    even = coded.shape[-2] + coded.shape[-2] % 2
    return (codes.pack(filled(coded, even)) if codec == "int4" else coded), codec, axis, scale, zero


def squared_distances(x: Float[Array, "T X"], centers: Float[Array, "M X"]) -> Float[Array, "T M"]:
    """|x - c|^2, up to |x|^2: what differs between centers."""
    return (centers * centers).sum(-1) - 2 * batched("tx,mx->tm", x, centers)


def shortlisted(
    own: Float[Array, "Pc X"], centers: Float[Array, "M X"], first: Int[Array, ""], grid: Grid
) -> Int[Array, " Ms"]:
    """Ordinals of at most `shortlist` centers before ordinal `first`, nearest to one of `own`; -1 where there is none.

    Row i of `centers` is ordinal i; those at `first` and later may hold anything finite.
    """
    earlier = jnp.arange(len(centers)) < first
    if len(centers) <= grid.shortlist:
        return jnp.where(earlier, jnp.arange(len(centers)), -1)
    # Each probe has its own |x|^2, which must be there to compare over probes.
    apart = squared_distances(own, centers) + (own * own).sum(-1)[:, None]
    near, ordinals = lax.top_k(jnp.where(earlier, -apart.min(0), -jnp.inf), grid.shortlist)
    return jnp.where(near > -jnp.inf, ordinals, -1)


def covering(distances: Float[Array, "T M"], visible: Array, forced: int, count: int) -> Int[Array, " R"]:
    """Indices of `count` centers, chosen greedily for the least sum over tokens of the distance to the nearest.

    `visible` [T, M]; center `forced` is visible to all tokens and comes first. Where no further center helps, it is
    named again.
    """
    distances = jnp.where(visible, distances, jnp.inf)

    def add(carry: Array, _: None) -> tuple[Array, Array]:
        gains = jnp.maximum(carry[:, None] - distances, 0).sum(0)
        best = jnp.where(gains.max() > 0, jnp.argmax(gains), forced)
        return jnp.minimum(carry, distances[:, best]), best

    _, chosen = lax.scan(add, distances[:, forced], None, length=count - 1)
    return jnp.concatenate([jnp.full(1, forced), chosen]).astype(jnp.int32)


def code_page(
    weights: Weights,
    grid: Grid,
    x: Float[Array, "P A W"],
    own: Float[Array, "Pc A W"],
    earlier: Float[Array, "Ms A W"],
    ordinals: Int[Array, " Ms"],
    first: Int[Array, ""],
) -> PageCode:
    """Codes one page.

    Args:
        x: its tokens; `own` its centers as stored, of which the first has ordinal `first`.
        earlier: centers of earlier pages that it may refer to, as stored; `ordinals` are theirs, -1 for none.
    """
    x, own, earlier = (part.astype(jnp.float32) for part in (x, own, earlier))
    candidates = jnp.concatenate([own, earlier])
    known = jnp.concatenate([first + jnp.arange(grid.own), ordinals])
    tokens = _others(x, grid)
    position = _others(first * grid.stride + jnp.arange(grid.page_size), grid)
    visible = (known >= 0) & (known * grid.stride <= position[:, None])
    flat = lax.stop_gradient(candidates).reshape(len(candidates), -1)
    distances = squared_distances(lax.stop_gradient(tokens).reshape(grid.others, -1), flat)
    chosen = covering(distances, visible, 0, grid.references)
    apart = jnp.where(visible[:, chosen], distances[:, chosen], jnp.inf)
    near, index = lax.top_k(-apart, grid.neighbours)
    index = jnp.where(near > -jnp.inf, index, index[:, :1])
    base = base_of(candidates[chosen], index)
    return PageCode(known[chosen], index, compress(weights, tokens) - compress(weights, base))


def base_of(references: Float[Array, "*S R A W"], index: Int[Array, "*S O k"]) -> Float[Array, "*S O A W"]:
    """b: the mean of the references that each token names, as a product with one-hot rows."""
    count = references.shape[-3]
    share = jax.nn.one_hot(index, count, dtype=jnp.float32).mean(-2)
    return batched("...or,...raw->...oaw", share, references)


def _others(per_token: Array, grid: Grid) -> Array:
    """Rows of a page [P, ..] that are no centers, in order."""
    split = per_token.reshape(grid.own, grid.stride, *per_token.shape[1:])[:, 1:]
    return split.reshape(grid.others, *per_token.shape[1:])


def whole_page(centers: Array, others: Array, grid: Grid, lead: int = 0) -> Array:
    """Tokens [.., P, ..] of pages in order, from centers [.., Pc, ..] and others; `lead` dimensions come before."""
    outer, rest = centers.shape[:lead], centers.shape[lead + 1 :]
    split = others.reshape(*outer, grid.own, grid.stride - 1, *rest)
    joined = jnp.concatenate([jnp.expand_dims(centers, lead + 1), split], axis=lead + 1)
    return joined.reshape(*outer, grid.page_size, *rest)


def code_sequence(
    weights: Weights, grid: Grid, x: Float[Array, "n A W"], head_dim: int
) -> tuple[PageCode, Float[Array, "S Pc A W"]]:
    """The code of every whole page of a sequence, each leaf with a leading S, and their centers as stored."""
    pages = x.reshape(-1, grid.page_size, *x.shape[1:]).astype(jnp.float32)
    own = stored_centers(pages[:, :: grid.stride], grid, head_dim)
    every = own.reshape(-1, *own.shape[2:])
    flat = lax.stop_gradient(every).reshape(len(every), -1)

    def one(number: Array, page: Array, mine: Array) -> PageCode:
        first = number * grid.own
        probes = lax.stop_gradient(mine).reshape(grid.own, -1)
        ordinals = shortlisted(probes, flat, first, grid)
        return code_page(weights, grid, page, mine, every[ordinals], ordinals, first)

    return jax.vmap(one)(jnp.arange(len(pages)), pages, own), own


def read_sequence(
    weights: Weights, grid: Grid, code: PageCode, own: Float[Array, "S Pc A W"], z: Float[Array, "S O A C"]
) -> Float[Array, "n A W"]:
    """Tokens of coded pages from their latents as stored."""
    every = own.reshape(-1, *own.shape[2:])
    others = expand(weights, z) + base_of(every[code.ordinals], code.index)
    return whole_page(own, others, grid, 1).reshape(-1, *own.shape[2:])


def reconstructed(weights: Weights, grid: Grid, x: Float[Array, "n A W"], head_dim: int) -> Float[Array, "n A W"]:
    """A sequence as it is read once its whole pages are sealed; gradients pass the rounding straight through.

    Tokens of the last page, where that is not full, stay as they are.
    """
    whole = len(x) // grid.page_size * grid.page_size
    if not whole:
        return x
    code, own = code_sequence(weights, grid, x[:whole], head_dim)
    read = read_sequence(weights, grid, code, own, stored_latents(code.z, grid))
    return jnp.concatenate([read, x[whole:].astype(jnp.float32)])
