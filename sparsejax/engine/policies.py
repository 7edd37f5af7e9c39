"""Which policy a request runs under, out of those its engine declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from sparsejax.engine.params import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.eviction import MOST_CLASSES, Eviction, bands
from sparsejax.sparsity.keep_rows import pack_keep
from sparsejax.sparsity.kinds import ALL
from sparsejax.sparsity.policy import SparsityConfig, yields_codec
from sparsejax.sparsity.rows import pack_policy
from sparsejax.sparsity.selector import Selector


class Policies:
    """The policies of one engine. The first is the default; reading everything is always allowed."""

    def __init__(
        self,
        declared: tuple[SparsityConfig, ...],
        selector: Selector | None,
        num_layers: int,
        max_model_len: int,
        settled: Callable[[SparsityConfig], SparsityConfig] = lambda policy: policy,
    ):
        """`settled` puts the model's own filter layers in a policy that leaves them open."""
        self.default = declared[0]
        self.selector = selector
        self.num_layers = num_layers
        self._longest = max_model_len
        self._settled = settled
        for policy in declared:
            policy.layer_roles(num_layers)
        evicting = [policy.keep for policy in declared if policy.keep.method != "all"]
        self._methods = list(dict.fromkeys(keep.compiled for keep in evicting))  # in the order of `Evictor.methods`
        self._bands = bands([policy.keep for policy in declared], num_layers)
        self._most_kept = max((keep.most_kept(max_model_len, self._bands) for keep in evicting), default=0)

    def of(self, params: SamplingParams, num_prompt: int) -> SparsityConfig:
        """The policy of a request.

        Raises:
            RequestError: it is no policy, names another codec, or what the engine has declared does not serve it.
        """
        if params.sparsity is None:
            return self.default
        try:
            policy = SparsityConfig.coerce(params.sparsity)
            if policy.codec is None or yields_codec(params.sparsity):
                policy = dataclasses.replace(policy, codec=self.default.codec)
            if policy.codec == self.default.codec:
                policy = self._settled(policy)
            policy.layer_roles(self.num_layers)
        except ConfigError as error:
            raise RequestError(str(error), parameter="sparsity", value=params.sparsity) from error
        if policy.codec != self.default.codec:
            raise RequestError(
                f"this engine stores its pages as {self.default.codec}, not as {policy.codec}: leave the codec out, "
                f"or start an engine with sparsity={policy.codec!r}.",
                parameter="sparsity",
                value=params.sparsity,
            )
        for name in ("compressor", "filter_codec"):
            if getattr(policy, name) not in (None, getattr(self.default, name)):
                raise RequestError(
                    f"this engine was started with {name}={getattr(self.default, name)!r}, not with "
                    f"{getattr(policy, name)!r}: leave it out.",
                    parameter="sparsity",
                    value=params.sparsity,
                )
        lacks = self._lacks(policy, num_prompt)
        if lacks is not None:
            raise RequestError(
                f"this engine serves {lacks}: declare what requests may choose when the engine starts, for example "
                "sparsity=['dense', 'quest', 'snapkv'].",
                parameter="sparsity",
                value=params.sparsity,
            )
        return policy

    def _lacks(self, policy: SparsityConfig, num_prompt: int) -> str | None:
        """What the engine serves where `policy` asks for more; None if it serves it."""
        keep, eviction = policy.keep, policy.keep.eviction(num_prompt, self._bands)
        if keep.method != "all" and keep.compiled not in self._methods:
            offered = ", ".join(f"{method} (window={window}, pool={pool})" for method, window, pool in self._methods)
            asked = f"{keep.name} (window={keep.window}, pool={keep.pool})"
            return f"{f'eviction by {offered}' if offered else 'no eviction'}, not by {asked}"
        if keep.beta > 1 and len(self._bands) < min(MOST_CLASSES, self.num_layers):
            return f"budgets that are the same in every layer, not beta={keep.beta:g}"
        if eviction and eviction.at <= self._longest and max(eviction.kept) > self._most_kept:
            return f"eviction down to at most {self._most_kept} tokens, not {max(eviction.kept)}"
        if policy.kind is ALL:
            return None
        return "only 'all'" if self.selector is None else self.selector.lacks(policy, num_prompt)

    def eviction(self, params: SamplingParams, num_prompt: int) -> Eviction | None:
        """When a request with this prompt evicts, and what stays; None if it never does."""
        return self.of(params, num_prompt).keep.eviction(num_prompt, self._bands)

    def pack_keep(
        self, params: SamplingParams, num_prompt: int, eviction: Eviction | None
    ) -> dict[str, np.ndarray] | None:
        """The request's row of the device's evictions; None where no request evicts."""
        if not self._methods:
            return None
        keep = self.of(params, num_prompt).keep
        return pack_keep(keep, self._methods.index(keep.compiled) if eviction else 0, eviction)

    def pack(self, params: SamplingParams, num_prompt: int) -> dict[str, np.ndarray] | None:
        """The request's row of the device's policies; None where the engine only reads everything."""
        if self.selector is None:
            return None
        policy = self.of(params, num_prompt)
        return pack_policy(policy, num_prompt, self.selector.page_size, self.selector.selects, self.num_layers)
