"""Proxies of a model on a text: a prompt read densely, then tokens of the text decoded under each policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax import Engine, EngineConfig, SamplingParams
from sparsejax.cache.group import dense_group
from sparsejax.errors import ConfigError
from sparsejax.evaluation import proxies
from sparsejax.evaluation.policies import DENSE, Policy, by_store
from sparsejax.evaluation.watched import Recorded, Shape, Watched, decode_batch
from sparsejax.models.decoder import Decoder
from sparsejax.models.loader import LoadedModel
from sparsejax.sparsity.calibration import read_filters, with_filters
from sparsejax.sparsity.eviction import EVEN_IN_PROMPTS, Keep
from sparsejax.sparsity.policy import SparsityConfig
from sparsejax.sparsity.rows import PolicyRows, pack_policy
from sparsejax.sparsity.selector import Selector


@dataclass(frozen=True)
class Proxies:
    """One policy on one text against dense attention.

    Attributes:
        recall: attention mass recall ``[L, B, H]`` of every layer, decoded token and query head.
        error: relative error of the attention outputs, alike.
        divergence: KL of the next-token distributions to dense ``[B]``, nats.
        agreement: share of the decoded tokens after which both have the same most likely next token.
        first_divergence: first token in which the greedy replies to the prompt differ; None where none does.
    """

    policy: Policy
    recall: np.ndarray
    error: np.ndarray
    divergence: np.ndarray
    agreement: float
    first_divergence: int | None

    @property
    def divergences(self) -> tuple[float, float, float]:
        """Mean, 99th percentile and largest of `divergence`."""
        values = self.divergence
        return float(values.mean()), float(np.percentile(values, 99)), float(values.max())


def probe(
    model: LoadedModel,
    token_ids: Sequence[int],
    policies: Sequence[Policy],
    *,
    steps: int,
    config: EngineConfig | None = None,
    report: Callable[[Proxies], None] = lambda found: None,
) -> tuple[list[Proxies], list[tuple[Policy, str]]]:
    """Compares every policy with dense attention on the last `steps` tokens after the ones before them.

    The prompt is read densely, then cut as its policy says. Each further token reads what a decode step would; a
    selection that serves several steps is made anew at each, and evictions during decode do not happen. Greedy
    replies come from the engine, where all of it does.

    Returns:
        What was found, in order, and the policies that cannot be probed with the reason.

    Raises:
        ConfigError: no prompt is left before the last `steps` tokens, or the model was not made for as many.
    """
    num_prompt, limit = len(token_ids) - steps, model.config.max_position_embeddings
    if steps < 1 or num_prompt < 1 or len(token_ids) > limit:
        raise ConfigError(
            f"{len(token_ids)} tokens, of which the last {steps} are decoded: the model takes up to {limit}, and both "
            "parts need at least one token"
        )
    reasons = [(policy, reason) for policy in policies if (reason := refusal(policy))]
    policies = [policy for policy in policies if not refusal(policy)]
    config = dataclasses.replace(config or EngineConfig(), max_model_len=len(token_ids))
    replies = greedy_replies(model, token_ids[:num_prompt], policies, steps, config)
    shape = _shape(model, len(token_ids), config.page_size)
    configs = [SparsityConfig.coerce(policy.sparsity) for policy in policies]
    configs = [with_filters(config, partial(read_filters, model)) for config in configs]
    selector = Selector.of(configs, config.page_size, model.config.num_kv_heads, len(token_ids))
    tokens = jnp.asarray(token_ids, jnp.int32)
    decoder = Decoder(model.config, model.dtype)
    prompt = _read(decoder, shape, model.params, tokens[:num_prompt])
    run = partial(_decode, decoder, num_prompt, selector, model.params, tokens[num_prompt:], prompt)
    dense, _ = run(_kept(prompt, SparsityConfig().keep), _rows(SparsityConfig(), num_prompt, steps, selector, shape))
    found = []
    for policy, one in zip(policies, configs, strict=True):
        logits, seen = run(_kept(prompt, one.keep), _rows(one, num_prompt, steps, selector, shape))
        found.append(
            Proxies(
                policy,
                *(np.asarray(jnp.stack(values)) for values in (seen.recall, seen.error)),
                np.asarray(proxies.divergence(dense, logits)),
                float((dense.argmax(-1) == logits.argmax(-1)).mean()),
                proxies.first_divergence(replies[DENSE], replies[policy]),
            )
        )
        report(found[-1])
    return found, reasons


def refusal(policy: Policy) -> str | None:
    """Why a policy cannot be probed; None if it can."""
    if policy.store != "dense":
        return f"its pages are stored as {policy.store}, and probes read keys and values as they were made"
    one = SparsityConfig.coerce(policy.sparsity)
    if one.keep.method in EVEN_IN_PROMPTS:
        return "it evicts while the prompt is read, and probes read the prompt densely"
    if one.keep.observes == "all":
        return "it counts the attention of every query, and probes look at those of the decoded tokens"
    if one.keep.method != "all" and one.select != "all":
        return "it selects among the tokens that it keeps, and probes do one of the two"
    return None


def greedy_replies(
    model: LoadedModel, prompt: Sequence[int], policies: Sequence[Policy], steps: int, config: EngineConfig
) -> dict[Policy, list[int]]:
    """Greedy tokens after the prompt under every policy, and under dense, by the engine."""
    replies = {}
    for group in by_store(dict.fromkeys((DENSE, *policies))).values():
        with Engine.from_loaded(model, config=config, sparsity=[policy.sparsity for policy in group]) as engine:
            params = [
                SamplingParams(
                    temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False, sparsity=policy.sparsity
                )
                for policy in group
            ]
            outputs = engine.generate([list(prompt)] * len(group), params, use_tqdm=False)
            replies |= {policy: output.outputs[0].token_ids for policy, output in zip(group, outputs, strict=True)}
    return replies


def _shape(model: LoadedModel, num_tokens: int, page_size: int) -> Shape:
    num_pages = 1 - -num_tokens // page_size
    return Shape(
        model.config, dense_group(model.config, page_size, model.dtype, num_pages, jax.default_backend()).layout
    )


def _rows(
    config: SparsityConfig, num_prompt: int, count: int, selector: Selector | None, shape: Shape
) -> PolicyRows | None:
    if selector is None:
        return None
    row = pack_policy(config, num_prompt, shape.layout.page_size, selector.selects, shape.model.num_layers)
    return PolicyRows(**{name: jnp.broadcast_to(value, (count, *value.shape)) for name, value in row.items()})


@partial(jax.jit, static_argnums=(0, 1))
def _read(decoder: Decoder, shape: Shape, params: Any, tokens: Array) -> Recorded:
    batch = SimpleNamespace(tokens=tokens, positions=jnp.arange(len(tokens)))
    return decoder.apply({"params": params}, batch, Recorded(shape))[1]


@partial(jax.jit, static_argnums=1)
def _kept(prompt: Recorded, keep: Keep) -> tuple[Array, ...]:
    return prompt.kept(keep)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    decoder: Decoder,
    num_prompt: int,
    selector: Selector | None,
    params: Any,
    tokens: Array,
    prompt: Recorded,
    kept: tuple[Array, ...],
    rows: PolicyRows | None,
) -> tuple[Float[Array, "B V"], Watched]:
    batch = decode_batch(prompt.shape, tokens, num_prompt, rows)
    hidden, seen = decoder.apply({"params": params}, batch, Watched(prompt, kept, selector))
    return decoder.apply({"params": params}, hidden, method="logits"), dataclasses.replace(seen, handed=None)
