"""Which policy a request runs under, out of those its engine declared."""

from __future__ import annotations

import numpy as np

from sparsejax.engine.params import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.kinds import ALL
from sparsejax.sparsity.policy import SparsityConfig
from sparsejax.sparsity.rows import pack_policy
from sparsejax.sparsity.selector import Selector


class Policies:
    """The policies of one engine. The first is the default; reading everything is always allowed."""

    def __init__(self, declared: tuple[SparsityConfig, ...], selector: Selector | None, num_layers: int):
        self.default = declared[0]
        self.selector = selector
        self.num_layers = num_layers
        for policy in declared:
            policy.layer_roles(num_layers)

    def of(self, params: SamplingParams, num_prompt: int) -> SparsityConfig:
        """The policy of a request.

        Raises:
            RequestError: it is no policy, or what the engine has declared does not serve it.
        """
        if params.sparsity is None:
            return self.default
        try:
            policy = SparsityConfig.coerce(params.sparsity)
            policy.layer_roles(self.num_layers)
        except ConfigError as error:
            raise RequestError(str(error), parameter="sparsity", value=params.sparsity) from error
        if policy.kind is ALL:
            return policy
        lacks = "only 'all'" if self.selector is None else self.selector.lacks(policy, num_prompt)
        if lacks is not None:
            raise RequestError(
                f"this engine serves {lacks}: declare what requests may choose when the engine starts, for example "
                "sparsity=['dense', 'quest'].",
                parameter="sparsity",
                value=params.sparsity,
            )
        return policy

    def pack(self, params: SamplingParams, num_prompt: int) -> dict[str, np.ndarray] | None:
        """The request's row of the device's policies; None where the engine only reads everything."""
        if self.selector is None:
            return None
        policy = self.of(params, num_prompt)
        return pack_policy(policy, num_prompt, self.selector.page_size, self.selector.selects, self.num_layers)
