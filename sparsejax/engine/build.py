"""From a config to a running core: load the model, size the pools, compile the first programs."""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import jax

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.group import CacheGroup, make_group, pages_for
from sparsejax.cache.plan import Plan
from sparsejax.cache.prefix import PrefixCache
from sparsejax.config import EngineConfig
from sparsejax.engine.compile import release_compiler_memory, use_compile_cache
from sparsejax.engine.core import EngineCore
from sparsejax.engine.latents import compressor_of
from sparsejax.engine.policies import Policies
from sparsejax.engine.runner import Runner
from sparsejax.engine.scheduler import Limits
from sparsejax.engine.table import StepTable
from sparsejax.engine.tiers import make_tiers
from sparsejax.errors import CapacityError, ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.loader import LoadedModel, load_model
from sparsejax.models.streaming import stream
from sparsejax.models.tokenizer import has_tokenizer, load_tokenizer
from sparsejax.sparsity.calibration import read_filters, with_filters
from sparsejax.sparsity.eviction import Keep, bands
from sparsejax.sparsity.evictor import Evictor
from sparsejax.sparsity.policy import SparsityConfig, declared
from sparsejax.sparsity.selector import Selector

CPU_POOL_LIMIT = 4 << 30
"""On a CPU the pools share memory with everything else: more than this must be asked for by name."""
WORKSPACE_BYTES = 1 << 30
"""Device memory left to the steps' temporaries on an accelerator."""
FIRST_PROGRAMS = 2
IMPLEMENTATIONS: dict[str, str | tuple[str, ...] | None] = {
    "auto": None,
    "xla": "xla",
    "reference": "reference",
    "pallas": ("mosaic_gpu", "mosaic_tpu", "xla"),
    "mosaic_gpu": ("mosaic_gpu", "xla"),
    "mosaic_tpu": ("mosaic_tpu", "xla"),
}
"""Backends of the array operations by `EngineConfig.backend`, best first; XLA serves what kernels decline."""


def build_core(config: EngineConfig, model: LoadedModel | None = None, tokenizer: Any = None) -> EngineCore:
    """Builds the core that `config` describes.

    Args:
        model, tokenizer: already loaded ones, instead of those that `config` names.
    """
    use_compile_cache(config.compile_cache_path())
    if model is None:
        place = (lambda path, array: array) if config.weight_memory_bytes else None
        model = load_model(config.model, config.dtype, progress=sys.stderr.isatty(), place=place)
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif tokenizer is None and model.path is not None and has_tokenizer(model.path):
        tokenizer = load_tokenizer(model.path)
    max_model_len = _max_model_len(config, model.config)
    table = StepTable.build(config.max_num_seqs, config.max_num_batched_tokens, config.num_decode_steps)
    width = -(-max_model_len // config.page_size)
    platform = jax.default_backend()
    policies, plan = declared(config.sparsity), None
    codec, compressor = policies[0].codec, compressor_of(policies[0], model, config.page_size)
    if compressor is None:
        measured = functools.cache(functools.partial(read_filters, model))
        settled = functools.partial(with_filters, measured=measured)
    else:
        plan = Plan.of(*compressor.facts, model.config.num_layers, policies[0].filter_codec)
        settled = functools.partial(SparsityConfig.within, filters=plan.filter_layers)
    policies = tuple(map(settled, policies))
    if config.weight_memory_bytes:
        model = stream(model, config.weight_memory_bytes)
    if plan is None:
        shape = (model.config, config.page_size, model.dtype, 1, platform)
        whole = make_group(*shape, codec=codec, num_rows=table.max_rows)
    else:
        whole = plan.group(model.config, model.dtype, 1, table.max_rows, platform)
    keeps = tuple(policy.keep for policy in policies)
    groups = _sized_groups(_kv_budget(config, model), whole, keeps, max_model_len, config.max_num_seqs)
    selector = Selector.of(policies, config.page_size, model.config.num_kv_heads, max_model_len)
    _check_keeps(policies, model.config)
    if len(groups) > 1 and (config.host_kv_bytes or config.disk_kv_bytes):
        raise ConfigError(
            f"host_kv_bytes={config.host_kv_bytes} and disk_kv_bytes={config.disk_kv_bytes}: pages go there through "
            "the prefix cache, which an engine whose budgets fall with depth (beta above 1, as 'pyramidkv') has not. "
            "Leave both at 0, or take keeps with beta=1."
        )
    evictor = Evictor.of(keeps, model.config, config.page_size, max_model_len)
    allocators = tuple(PageAllocator(group.layout.num_pages) for group in groups)
    runner = Runner(model, groups, table, width, IMPLEMENTATIONS[config.backend], selector, evictor, compressor)
    tiers = make_tiers(config, runner, (model.config, codec, plan, IMPLEMENTATIONS[config.backend]))
    core = EngineCore(
        runner,
        allocators,
        Limits(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            table.max_chunk,
            config.page_size,
            config.num_decode_steps,
            share_whole_pages=codec != "dense",
            conversation_pages=config.conversation_pages,
        ),
        max_model_len=max_model_len,
        eos_ids=model.config.eos_token_ids,
        tokenizer=tokenizer,
        seed=config.seed,
        cache=PrefixCache(allocators[0], config.page_size, tiers.identity if tiers else ""),
        # A cached prefix is pages of one group.
        prefix_caching=config.enable_prefix_caching and len(groups) == 1,
        cache_outputs=config.cache_outputs,
        tiers=tiers,
        policies=Policies(policies, selector, model.config.num_layers, max_model_len, settled),
    )
    _warm(core, config)
    return core


def _sized_groups(
    budget_bytes: int, whole: CacheGroup, keeps: tuple[Keep, ...], max_model_len: int, num_rows: int
) -> tuple[CacheGroup, ...]:
    """One group of all layers, or one of each class of layers whose budgets differ.

    A pool holds a whole prompt, which all layers need until it is cut, and beside it rows that have been cut.
    """
    layers, page_size = bands(keeps, len(whole.layers)), whole.layout.page_size
    longest = -(-max_model_len // page_size)
    evictions = [keep.eviction(max_model_len, layers) for keep in keeps]
    held = tuple(
        max(longest if eviction is None else -(-eviction.kept[index] // page_size) + 1 for eviction in evictions)
        for index in range(len(layers))
    )
    if len(layers) == 1:
        held = (longest,)
    groups = whole.split(layers, (1,) * len(layers))
    return whole.split(layers, pages_for(budget_bytes, groups, longest, num_rows, held))


def _check_keeps(policies: tuple[SparsityConfig, ...], model: DecoderConfig) -> None:
    evicting = [policy.keep.name for policy in policies if policy.keep.method != "all"]
    if evicting and any(model.windows):
        raise ConfigError(
            f"sparsity {evicting[0]!r} evicts tokens, but layers of this model see a sliding window, which counts "
            "tokens that are gone: use a policy that keeps everything, such as 'dense' or 'quest'."
        )


def _warm(core: EngineCore, config: EngineConfig) -> None:
    if config.warmup == "none":
        return
    keys = list(core.runner.table.keys())
    if config.warmup == "lazy":
        keys = keys[:FIRST_PROGRAMS]
    if core.tiers is not None:
        core.tiers.transfers.warm()
    core.runner.warm(keys, progress=_progress_bar if sys.stderr.isatty() else list)
    release_compiler_memory()


def _progress_bar(keys: list) -> Any:
    from tqdm import tqdm

    start = time.monotonic()
    bar = tqdm(keys, desc="compiling steps (cached for next time)", leave=False, delay=1.0)
    yield from bar
    bar.set_postfix_str(f"{time.monotonic() - start:.1f}s")


def _max_model_len(config: EngineConfig, model: DecoderConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds what the model was made for ({limit} positions): "
            f"lower it to at most {limit}, or use a checkpoint with rope scaling."
        )
    return config.max_model_len


def _kv_budget(config: EngineConfig, model: LoadedModel) -> int:
    """Bytes that the KV pools may take."""
    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        left = int(stats["bytes_limit"] * config.memory_utilization) - stats["bytes_in_use"] - WORKSPACE_BYTES
        if left <= 0:
            raise CapacityError(
                f"the weights leave no device memory for the KV cache ({stats['bytes_in_use']:,} of "
                f"{stats['bytes_limit']:,} bytes in use, memory_utilization={config.memory_utilization}): raise "
                "memory_utilization, or use a smaller model or dtype."
            )
        return left
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(free * config.memory_utilization) // 2, CPU_POOL_LIMIT)
