"""What a model and its KV cache need and how many sequences fit, before anything is loaded.

sparsejax memory --model path/or/hub-id --length 8192 --length 131072
sparsejax memory --model path/or/hub-id --sparsity deltakv --latent 512 --filter-layers 0 1 2 8 18 --platform tpu
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsejax.cli import options, show
from sparsejax.errors import ConfigError

LENGTHS = (4096, 32768, 131072)
PLATFORMS = ("cpu", "gpu", "tpu")


@dataclass(frozen=True)
class Need:
    """Bytes of one model under one configuration.

    Attributes:
        room: what is left for KV pages beside the weights; or what ``kv_memory_bytes`` allows.
        sequences: sequence length in tokens -> how many such sequences the room holds.
        parts: under DeltaKV, bytes by component that the longest of these sequences holds, and in dense pages.
    """

    dtype: str
    parameters: int
    weights: int
    kv_bytes_per_token: int
    page_bytes: int
    room: int
    room_source: str
    sequences: dict[int, int]
    parts: dict[str, int] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("question")
    group.add_argument(
        "--length",
        type=int,
        action="append",
        metavar="N",
        help="sequence length in tokens; may be repeated (default: 4096, 32768, 131072 and the longest)",
    )
    group.add_argument("--latent", type=int, metavar="C", help="DeltaKV without a compressor: latent width of a layer")
    group.add_argument(
        "--filter-layers", type=int, nargs="+", metavar="L", help="DeltaKV without a compressor: layers without latents"
    )
    group.add_argument(
        "--platform",
        choices=PLATFORMS,
        help="whose layouts of pages to count (default: this machine's); the room is always this machine's",
    )
    group.add_argument("--json", action="store_true", help="print the figures as JSON")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from sparsejax.models.files import find_model
    from sparsejax.models.loader import load_config

    config = options.make_config(args)
    path = find_model(config.model)
    model = load_config(path)
    longest = config.max_model_len or model.max_position_embeddings
    lengths = args.length or [n for n in LENGTHS if n < longest] + [longest]
    plan = plan_of(config, model, path, args.latent, args.filter_layers)
    need = measure(config, model, stored_dtype(path), sorted({max(n, 1) for n in lengths}), plan, args.platform)
    print(json.dumps(asdict(need), indent=2) if args.json else as_text(need, config.page_size, str(path)))
    return 0


def stored_dtype(path: Any) -> str:
    """The dtype that ``config.json`` names."""
    from sparsejax.models.files import read_json

    raw = read_json(path / "config.json")
    return raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"


def plan_of(config: Any, model: Any, path: Any, latent: int | None, filters: list[int] | None) -> Any:
    """How DeltaKV stores the cache, if the engine uses it: as its compressor says, or as the flags do."""
    from pallas_kernels.deltakv import Grid
    from sparsejax.cache.codecs.compressor import read_shapes
    from sparsejax.cache.plan import Plan
    from sparsejax.engine.latents import beside
    from sparsejax.sparsity.policy import declared

    policy = declared(config.sparsity)[0]
    if policy.codec != "deltakv":
        return None
    if latent is not None and filters is not None:
        return Plan(Grid(config.page_size), latent, tuple(filters), policy.filter_codec or "int4")
    compressor = policy.compressor or beside(path)
    if compressor is None:
        raise ConfigError(
            "codec='deltakv' needs a compressor, and there is none beside the model: name its folder in --sparsity, or "
            "say what it would be with --latent and --filter-layers."
        )
    return Plan.of(*read_shapes(compressor), model.num_layers, policy.filter_codec)


def measure(
    config: Any, model: Any, stored: str, lengths: list[int], plan: Any = None, platform: str | None = None
) -> Need:
    """The needs of ``model`` (a DecoderConfig) under ``config`` (an EngineConfig) in the room of this machine.

    Args:
        plan: that of DeltaKV.
        platform: whose layouts pages have; None is what JAX computes on here.
    """
    import jax

    from sparsejax.cache.group import make_group
    from sparsejax.cache.plan import cache_bytes
    from sparsejax.engine.table import StepTable
    from sparsejax.models.loaded import resolve_dtype
    from sparsejax.models.params import param_count
    from sparsejax.sparsity.policy import declared

    platform = platform or jax.default_backend()
    dtype = resolve_dtype(config.dtype, stored)
    weights = param_count(model) * dtype.itemsize
    rows = StepTable.build(config.max_num_seqs, config.max_num_batched_tokens, config.num_decode_steps).max_rows
    codec = declared(config.sparsity)[0].codec
    if plan is None:
        group, parts = make_group(model, config.page_size, dtype, 1, platform, codec=codec, num_rows=rows), {}
    else:
        group = plan.group(model, dtype, 1, rows, platform)
        parts = cache_bytes(model, plan, lengths[-1], dtype, platform=platform)
    page_bytes = group.page_bytes
    if config.kv_memory_bytes is not None:
        room, source = config.kv_memory_bytes, "kv_memory_bytes"
    else:
        free, where = free_memory()
        room = max(0, int(free * config.memory_utilization) - weights)
        source = f"{config.memory_utilization:.0%} of the {show.size(free)} free {where}, less the weights"
    pages = max(0, (room - group.fixed_bytes) // page_bytes - 1)  # one page takes the writes of padding
    return Need(
        dtype=dtype.name,
        parameters=param_count(model),
        weights=weights,
        kv_bytes_per_token=page_bytes // config.page_size,
        page_bytes=page_bytes,
        room=room,
        room_source=source,
        sequences={length: pages // -(-length // config.page_size) for length in lengths},
        parts=parts,
    )


def free_memory() -> tuple[int, str]:
    """Free bytes of the first device, and where they are."""
    import jax

    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"], "on the device"
    import psutil

    return psutil.virtual_memory().available, "in main memory"


def as_text(need: Need, page_size: int, path: str) -> str:
    per_page = f"{show.size(need.page_bytes)} per page of {page_size} tokens"
    rows = [
        ("weights", f"{show.size(need.weights)} ({need.parameters:,} parameters in {need.dtype})"),
        ("KV cache", f"{show.size(need.kv_bytes_per_token)} per token, {per_page}"),
        ("room for KV", f"{show.size(need.room)} ({need.room_source})"),
        *(
            (f"{length:,} tokens", f"{show.size(length * need.kv_bytes_per_token)} each, {count:,} at once")
            for length, count in need.sequences.items()
        ),
    ]
    if need.parts:
        dense = need.parts["dense"]
        rows += [
            (f"  {name}", f"{show.size(held)}, {100 * held / dense:.1f}% of dense pages")
            for name, held in need.parts.items()
            if held and name != "dense"
        ]
    lines = [path, show.table(rows)]
    if 0 in need.sequences.values():
        lines.append("Where none fits: free memory, give --kv-memory-bytes, or take a smaller model or dtype.")
    return "\n".join(lines)
