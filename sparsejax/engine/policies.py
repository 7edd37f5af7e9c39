"""Which policy a request runs under, out of those its engine declared, and what that reads."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.scheduler import StepPlan
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.kinds import ALL
from sparsejax.sparsity.policy import SparsityConfig, selects_of
from sparsejax.sparsity.rows import pack_policy


class Policies:
    """The policies of one engine. The first is the default; reading everything is always allowed."""

    def __init__(self, declared: tuple[SparsityConfig, ...], page_size: int, num_layers: int):
        self.default = declared[0]
        self.page_size = page_size
        self.num_layers = num_layers
        self._selects = selects_of(declared)

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
        if policy.kind not in self._selects:
            raise RequestError(
                f"this engine serves the selects {', '.join(kind.name for kind in self._selects)}, not "
                f"{policy.kind.name!r}: "
                "declare it when the engine starts, for example sparsity=['dense', 'quest'].",
                parameter="sparsity",
                value=params.sparsity,
            )
        return policy

    def pack(self, params: SamplingParams, num_prompt: int) -> dict[str, np.ndarray] | None:
        """The request's row of the device's policies; None where the engine only reads everything."""
        if self._selects == (ALL,):
            return None
        return pack_policy(self.of(params), num_prompt, self.page_size, self._selects, self.num_layers)

    def count_reads(self, plan: StepPlan, params: list[SamplingParams], counters: Counter[str]) -> None:
        """Adds the pages that the decode rows of a step hold, and those that it reads, per layer and KV head."""
        for sequence, its in zip(plan.decode, params, strict=True):
            pages = self.of(its).page_counts(sequence.num_prompt, self.page_size)
            for step in range(plan.num_steps):
                listed = -(-(sequence.num_computed - step) // self.page_size)
                counters["decode_pages_held"] += listed
                counters["decode_pages_read"] += min(listed, pages.budget)
