"""What a model and its KV cache need and how many sequences fit, before anything is loaded.

sparsejax memory --model path/or/hub-id --length 8192 --length 131072
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from sparsejax.cli import options, show

LENGTHS = (4096, 32768, 131072)


@dataclass(frozen=True)
class Need:
    """Bytes of one model under one configuration.

    Attributes:
        room: what is left for KV pages beside the weights; or what ``kv_memory_bytes`` allows.
        sequences: sequence length in tokens -> how many such sequences the room holds.
    """

    dtype: str
    parameters: int
    weights: int
    kv_bytes_per_token: int
    page_bytes: int
    room: int
    room_source: str
    sequences: dict[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("question")
    group.add_argument(
        "--length",
        type=int,
        action="append",
        metavar="N",
        help="sequence length in tokens; may be repeated (default: 4096, 32768, 131072 and the longest)",
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
    need = measure(config, model, stored_dtype(path), sorted({max(n, 1) for n in lengths}))
    print(json.dumps(asdict(need), indent=2) if args.json else as_text(need, config.page_size, str(path)))
    return 0


def stored_dtype(path: Any) -> str:
    """The dtype that ``config.json`` names."""
    from sparsejax.models.files import read_json

    raw = read_json(path / "config.json")
    return raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"


def measure(config: Any, model: Any, stored: str, lengths: list[int]) -> Need:
    """The needs of ``model`` (a DecoderConfig) under ``config`` (an EngineConfig) on this machine."""
    from sparsejax.cache.group import make_group
    from sparsejax.engine.table import StepTable
    from sparsejax.models.loaded import resolve_dtype
    from sparsejax.models.params import param_count
    from sparsejax.sparsity.policy import declared

    dtype = resolve_dtype(config.dtype, stored)
    weights = param_count(model) * dtype.itemsize
    rows = StepTable.build(config.max_num_seqs, config.max_num_batched_tokens, config.num_decode_steps).max_rows
    codec = declared(config.sparsity)[0].codec
    group = make_group(model, config.page_size, dtype, 1, codec=codec, num_rows=rows)
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
    lines = [path, show.table(rows)]
    if 0 in need.sequences.values():
        lines.append("Where none fits: free memory, give --kv-memory-bytes, or take a smaller model or dtype.")
    return "\n".join(lines)
