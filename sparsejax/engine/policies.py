"""Which policy a request runs under, out of those its engine declared, and what that reads."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.scheduler import StepPlan
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.eviction import Eviction
from sparsejax.sparsity.keep_rows import pack_keep
from sparsejax.sparsity.policy import SparsityConfig
from sparsejax.sparsity.rows import pack_policy


class Policies:
    """The policies of one engine. The first is the default; reading everything is always allowed."""

    def __init__(self, declared: tuple[SparsityConfig, ...], page_size: int, max_model_len: int):
        self.default = declared[0]
        self.page_size = page_size
        self._selects = {policy.select for policy in declared} | {"all"}
        self._active = self._selects != {"all"}
        # In the order of `Evictor.methods`.
        self._methods = list(dict.fromkeys(policy.keep.compiled for policy in declared if policy.keep.method != "all"))
        self._most_kept = max((p.keep.kept(max_model_len) for p in declared if p.keep.method != "all"), default=0)

    def of(self, params: SamplingParams) -> SparsityConfig:
        """The policy of a request.

        Raises:
            RequestError: it is no policy, or the engine has not declared its select.
        """
        if params.sparsity is None:
            return self.default
        try:
            policy = SparsityConfig.coerce(params.sparsity)
        except ConfigError as error:
            raise RequestError(str(error), parameter="sparsity", value=params.sparsity) from error
        if policy.select not in self._selects:
            raise RequestError(
                f"this engine serves the selects {', '.join(sorted(self._selects))}, not {policy.select!r}: "
                "declare it when the engine starts, for example sparsity=['dense', 'quest'].",
                parameter="sparsity",
                value=params.sparsity,
            )
        self._check_keep(policy, params)
        return policy

    def _check_keep(self, policy: SparsityConfig, params: SamplingParams) -> None:
        keep = policy.keep
        if keep.method == "all":
            return
        if keep.compiled not in self._methods:
            offered = ", ".join(f"{name} (window={window}, pool={pool})" for name, window, pool in self._methods)
            raise RequestError(
                f"this engine evicts by {offered or 'no method'}, not by {keep.name} (window={keep.window}, "
                f"pool={keep.pool}): declare it when the engine starts, for example sparsity=['dense', 'snapkv'].",
                parameter="sparsity",
                value=params.sparsity,
            )

    def eviction(self, params: SamplingParams, num_prompt: int) -> Eviction | None:
        """When a request with this prompt evicts, and what stays; None if it never does.

        Raises:
            RequestError: it would keep more tokens than any policy that the engine declared.
        """
        eviction = self.of(params).keep.eviction(num_prompt)
        if eviction and eviction.kept > self._most_kept:
            raise RequestError(
                f"keeping {eviction.kept} tokens is more than the {self._most_kept} that the engine's policies keep at "
                "most: lower the budget, or declare a larger one when the engine starts.",
                parameter="sparsity",
                value=params.sparsity,
            )
        return eviction

    def pack_keep(self, params: SamplingParams, eviction: Eviction | None) -> dict[str, np.ndarray] | None:
        """The request's row of the device's evictions; None where no request evicts."""
        if not self._methods:
            return None
        keep = self.of(params).keep
        return pack_keep(keep, self._methods.index(keep.compiled) if eviction else 0, eviction)

    def pack(self, params: SamplingParams, num_prompt: int) -> dict[str, np.ndarray] | None:
        """The request's row of the device's policies; None where the engine only reads everything."""
        return pack_policy(self.of(params), num_prompt, self.page_size) if self._active else None

    def count_reads(self, plan: StepPlan, params: list[SamplingParams], counters: Counter[str]) -> None:
        """Adds the pages that the decode rows of a step would hold without eviction, those that they hold, and those
        that it reads, per layer and KV head."""
        for sequence, its in zip(plan.decode, params, strict=True):
            pages = self.of(its).page_counts(sequence.num_prompt, self.page_size)
            for step in range(plan.num_steps):
                counters["decode_pages_dense"] += -(-(sequence.num_computed - step) // self.page_size)
                listed = -(-(sequence.num_computed - sequence.shift - step) // self.page_size)
                counters["decode_pages_held"] += listed
                counters["decode_pages_read"] += pages.read(listed)
