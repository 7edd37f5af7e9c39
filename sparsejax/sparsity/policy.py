"""`SparsityConfig`: what a request reads of its KV cache. Imports no JAX."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity import names, valid
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.kinds import ALL, SELECTS, Select


@dataclass(frozen=True)
class SparsityConfig:
    """A point of keep ∘ select ∘ codec.

    The prompt reads every page. Then `keep` cuts the cache, and every decode step reads the selected pages of what
    is left in each layer. A budget that covers the sequence keeps and reads all of it, and costs nothing besides.
    Under a codec a token reads its own page in the model's dtype and every earlier one as stored.

    Attributes:
        keep: which tokens stay in the cache: a `Keep`, or the name of its method.
        select: which pages a decode step reads, by name or as `kinds.Select.scored` makes one: ``all``;
            ``window``, the newest; ``strided``, every n-th; ``random``, a fixed random subset of the request;
            ``oracle``, the pages with the largest attention probability (it reads everything to know them: a
            bound on what selection can reach, not a method); ``quest``, the largest upper bounds of the
            attention scores (Tang et al., arXiv 2406.10774); ``omnikv``, as ``oracle`` in few layers whose
            lists the layers after them reuse (Hao et al., ICLR 2025).
        budget: tokens read per KV head, sinks and recents included; a float is a share of the prompt.
        sink, recent: tokens at the start and at the end that are always read, rounded up to pages.
        stride: of ``strided``, in pages; None is the smallest that fits the budget over the prompt.
        interval: decode steps that a selection serves; steps at multiples of it select anew.
        top_p: read the fewest pages whose estimated attention probability reaches this share of what is not
            pinned, `budget` at most (after Lin et al., Twilight, arXiv 2502.02770). 1 reads the whole budget.
        block: pages of a block whose bounds are scored first: then only the pages of the best blocks are, and pages
            whose blocks score low go unseen. Rows for which that does not halve what is scored score every page, and
            0 always does. One size for all policies of an engine.
        candidates: pages in the best blocks, as a multiple of the pages to select.
        filter_layers: layers that select; the layers after each of them reuse its list, those before the first
            read everything. ``"auto"`` takes those that were measured for the model (`sparsejax calibrate`), or
            spreads three over the depth; None is every layer for itself.
        dense_layers: so many first layers read everything. Of ``"auto"`` the filter layers after them remain, and the
            first layer after them becomes one.
        recall_every: measure at every n-th position, with a dense pass, which share of the attention probability
            the selection captured; 0 never does.
        recall_floor: where the mean over layers falls under this share, the row's budget doubles, and past the
            longest list the row reads everything from there on.
        seed: of ``random``.
        codec: how full pages are stored: ``dense`` (the model's dtype), ``int8``, ``fp8`` (e4m3), ``int4`` or
            ``deltakv`` (residual latents in most layers, after arXiv 2602.08005). One for all policies of an engine;
            None takes that of the others, or ``dense``.
        compressor: of ``deltakv``, the folder of a trained compressor, whose layers hold latents; the others are its
            filter layers, and ``filter_layers="auto"`` names them. None is the folder ``deltakv`` of the model.
        filter_codec: of ``deltakv``, how its filter layers store pages: a codec of the others; None is ``int4``.
    """

    keep: Keep | str = "all"
    select: str | Select = "all"
    budget: int | float = 2048
    sink: int = 4
    recent: int = 64
    stride: int | None = None
    interval: int = 1
    top_p: float = 1.0
    block: int = 0
    candidates: int = 4
    filter_layers: tuple[int, ...] | str | None = None
    dense_layers: int = 0
    recall_every: int = 0
    recall_floor: float = 0.0
    seed: int = 0
    codec: str | None = None
    compressor: str | None = None
    filter_codec: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Keep):
            object.__setattr__(self, "keep", Keep(self.keep))
        if not isinstance(self.select, Select) and self.select not in SELECTS:
            raise ConfigError(
                f"select={self.select!r} is not one of {', '.join(map(repr, SELECTS))}; "
                "a function of your own is Select.scored(function)."
            )
        valid.codec(self.codec)
        valid.filter_codec(self.filter_codec)
        valid.budget(self.budget)
        for name in ("sink", "recent", "block", "dense_layers", "recall_every", "seed"):
            valid.integer(name, getattr(self, name), 0)
        for name in ("interval", "candidates"):
            valid.integer(name, getattr(self, name), 1)
        if self.stride is not None:
            valid.integer("stride", self.stride, 1)
        valid.share("top_p", self.top_p)
        if self.recall_floor:
            valid.share("recall_floor", self.recall_floor)
        object.__setattr__(self, "filter_layers", valid.layers(self.filter_layers))
        for reason in valid.refusals(self):
            raise ConfigError(reason)

    @property
    def kind(self) -> Select:
        """The select itself."""
        return self.select if isinstance(self.select, Select) else SELECTS[self.select]

    @property
    def shared(self) -> bool:
        """Whether all KV heads read one list. Lists that other layers reuse are: their heads are others."""
        return self.kind.shared or self.filter_layers is not None

    @classmethod
    def preset(cls, name: str, **parameters: Any) -> SparsityConfig:
        """A preset, or several joined (``"keydiff:0.5+quest:0.25+int8"``), with parameters changed: see `names`.

        Raises:
            ConfigError: there is no such preset or parameter, or they do not go together.
        """
        return cls(**names.fields_of(name, PRESETS, parameters))

    @classmethod
    def coerce(cls, value: Any) -> SparsityConfig:
        """A config, a name as `preset` takes it, or a mapping such as ``{"preset": "quest", "budget": 1024}``."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.preset(value)
        if isinstance(value, Mapping) and "preset" in value:
            return cls.preset(**{"name" if key == "preset" else key: item for key, item in value.items()})
        raise ConfigError(
            f"sparsity={value!r}: give a SparsityConfig, the name of a preset or a mapping with 'preset' "
            f"({', '.join(PRESETS)})."
        )

    def within(self, filters: tuple[int, ...]) -> SparsityConfig:
        """This policy where only the layers `filters` can select, because the others hold latents.

        Raises:
            ConfigError: it names other filter layers.
        """
        if self.filter_layers is None:
            return self
        if self.filter_layers == "auto":
            later = tuple(layer for layer in filters if layer >= self.dense_layers)
            return dataclasses.replace(self, filter_layers=later or filters[-1:], dense_layers=0)
        if others := sorted(set(self.filter_layers) - set(filters)):
            raise ConfigError(
                f"filter_layers={self.filter_layers}: layers {others} hold latents and cannot select; choose of "
                f"{filters}, or leave it at 'auto'."
            )
        return self

    def settled(self, filters: tuple[int, ...]) -> SparsityConfig:
        """This policy with the filter layers of the model where it says ``"auto"``."""
        if self.filter_layers != "auto":
            return self
        if self.dense_layers:
            filters = (self.dense_layers, *(layer for layer in filters if layer > self.dense_layers))
        return dataclasses.replace(self, filter_layers=filters)

    def page_counts(self, num_prompt: int, page_size: int) -> PageCounts:
        """Budget, sinks and recents of a request in pages; the budget holds what is pinned."""
        if self.kind is ALL:
            return PageCounts(ALL_PAGES, 0, 1, 0, 1, 0, 0)
        sinks = -(-self.sink // page_size)
        # The open page, and as many full ones as keep `recent` tokens in view wherever the open one stands.
        recents = 1 + -(-max(self.recent - 1, 0) // page_size)
        # A list that serves several steps has room for the pages that these open.
        growth = -(-(self.interval - 1) // page_size)
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * num_prompt)
        budget = max(-(-tokens // page_size), sinks + recents + growth)
        middle = -(-num_prompt // page_size) - sinks - recents
        fitting = -(-max(middle, 1) // max(budget - sinks - recents, 1))
        blocks = most = 0
        if self.block:
            blocks = -(-self.candidates * max(budget - sinks - recents, 1) // self.block)
            most = blocks - (-sinks // self.block) - (-recents // self.block) + 1
        return PageCounts(budget, sinks, recents, growth, self.stride or fitting, blocks, most)

    def layer_roles(self, num_layers: int) -> tuple[Role, ...]:
        """What each layer of a model does in a decode step.

        Raises:
            ConfigError: a filter layer is none of the model's.
        """
        layers = range(num_layers)
        if self.kind is ALL or self.dense_layers >= num_layers:
            return tuple(Role.READ_ALL for _ in layers)
        filters = self.settled(spread_filters(num_layers)).filter_layers
        if filters is None:
            return tuple(Role.READ_ALL if layer < self.dense_layers else Role.SELECT for layer in layers)
        if filters[-1] >= num_layers:
            raise ConfigError(f"filter_layers={filters}: the model has layers 0 to {num_layers - 1} only.")
        own = Role.SELECT_READ_ALL if self.kind.reads_all else Role.SELECT
        before = (Role.READ_ALL,) * filters[0]
        return before + tuple(own if layer in filters else Role.REUSE for layer in layers[filters[0] :])


def spread_filters(num_layers: int) -> tuple[int, ...]:
    """Filter layers of a model for which none were measured: 0, a quarter and nine sixteenths of the depth."""
    return tuple(sorted({0, num_layers // 4, 9 * num_layers // 16}))


class Role(enum.IntEnum):
    """What a layer does for a row in a decode step."""

    READ_ALL = 0
    SELECT = 1
    """Reads its own list."""
    REUSE = 2
    """Reads the list of the nearest layer before that has one."""
    SELECT_READ_ALL = 3
    """Reads everything in the steps in which it selects, its own list in the others."""


ALL_PAGES = 2**30


@dataclass(frozen=True)
class PageCounts:
    """In pages: what a step reads at most, what of it at the start and the end it always reads, what of it is
    left free for the pages that open while a selection is in use, and the stride of ``strided``. In blocks: those
    whose pages are candidates (0: every page is one), and with the blocks of pinned pages."""

    budget: int
    sinks: int
    recents: int
    growth: int
    stride: int
    blocks: int
    most_blocks: int


PRESETS: dict[str, SparsityConfig] = {
    "dense": SparsityConfig(codec="dense"),
    "window": SparsityConfig(select="window"),
    "strided": SparsityConfig(select="strided"),
    "random": SparsityConfig(select="random"),
    "oracle": SparsityConfig(select="oracle"),
    "quest": SparsityConfig(select="quest"),
    "omnikv": SparsityConfig(select="omnikv", filter_layers="auto"),
    "turbo": SparsityConfig(select="quest", filter_layers="auto", dense_layers=2, codec="int4"),
    "streaming": SparsityConfig(Keep("streaming", interval=256)),
    "snapkv": SparsityConfig(Keep("snapkv")),
    "pyramidkv": SparsityConfig(Keep("snapkv", beta=20.0)),
    "keydiff": SparsityConfig(Keep("keydiff")),
    "expected_attention": SparsityConfig(Keep("expected_attention", window=64)),
    "rkv": SparsityConfig(Keep("rkv")),
    "h2o": SparsityConfig(Keep("h2o")),
    "random_keep": SparsityConfig(Keep("random")),
    "int8": SparsityConfig(codec="int8"),
    "fp8": SparsityConfig(codec="fp8"),
    "int4": SparsityConfig(codec="int4"),
    "deltakv": SparsityConfig(select="omnikv", filter_layers="auto", codec="deltakv"),
}


def yields_codec(value: Any) -> bool:
    """Whether a policy brings its preset's codec unasked, which gives way to one that is named (`turbo` over int8)."""
    if isinstance(value, SparsityConfig) or (isinstance(value, Mapping) and "codec" in value):
        return False
    found = names.parts(value["preset"] if isinstance(value, Mapping) else value, PRESETS)
    return any(part.yields_codec for part in found) and not any(part.stores_only for part in found)


def declared(value: Any) -> tuple[SparsityConfig, ...]:
    """What an engine offers: one policy or several, the first of them its default, all with the same codec.

    Raises:
        ConfigError: none is named, one is no policy, or they name different codecs.
    """
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise ConfigError("sparsity=() names no policy; give at least 'dense'.")
    policies = tuple(SparsityConfig.coerce(item) for item in values)
    firm = {policy.codec for item, policy in zip(values, policies, strict=True) if not yields_codec(item)}
    codecs = sorted(firm - {None} or {policy.codec for policy in policies} - {None})
    if len(codecs) > 1:
        raise ConfigError(
            f"sparsity names the codecs {' and '.join(codecs)}, but an engine stores all pages in one: give every "
            "policy the same codec, or leave it out of all but one (presets that select or evict name none)."
        )
    shared = {"codec": codecs[0] if codecs else "dense"}
    for name in ("compressor", "filter_codec"):
        given = dict.fromkeys(value for policy in policies if (value := getattr(policy, name)) is not None)
        if len(given) > 1:
            raise ConfigError(f"sparsity names {name}s {' and '.join(given)}, but an engine has one: give it once.")
        shared[name] = next(iter(given), None)
    return tuple(dataclasses.replace(policy, **shared) for policy in policies)


def selects_of(policies: tuple[SparsityConfig, ...]) -> tuple[Select, ...]:
    """The selects that an engine serves, reading all first."""
    return tuple(dict.fromkeys((ALL, *(policy.kind for policy in policies))))
