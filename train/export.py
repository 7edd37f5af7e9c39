"""Write a training run as a checkpoint: ``python -m train.export --recipe R --run DIR --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.models.config import DecoderConfig, RopeConfig
from sparsejax.models.export import save_pretrained
from train import model
from train.pretrain import Trainer
from train.recipe import load_recipe
from train.vocabulary import BOS, EOS, PAD, build_tokenizer, save_tokenizer


def decoder_config(shape: model.Shape, max_position: int) -> DecoderConfig:
    """The serving configuration of a training shape."""
    tokenizer = build_tokenizer()
    pad, bos, eos = (tokenizer.token_to_id(token) for token in (PAD, BOS, EOS))
    return DecoderConfig(
        family="llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=shape.norm_eps,
        rope=RopeConfig(theta=shape.rope_theta),
        max_position_embeddings=max_position,
        bos_token_id=bos,
        eos_token_ids=(eos,),
        pad_token_id=pad,
    )


def export(shape: model.Shape, params: model.Params, out: str | Path, *, max_position: int, dtype: Any) -> Path:
    """Write model.safetensors, config.json and the tokenizer files into `out`."""
    host = {name: _host(value) for name, value in params.items()}
    path = save_pretrained(out, decoder_config(shape, max_position), host, dtype)
    save_tokenizer(path, max_position)
    return path


def _host(value: Any) -> Any:
    return {name: _host(one) for name, one in value.items()} if isinstance(value, dict) else np.asarray(value)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="JSON recipe file of the run")
    parser.add_argument("--run", required=True, help="folder of the run; its latest checkpoint is written")
    parser.add_argument("--out", required=True, help="folder of the new checkpoint")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    trainer = Trainer(recipe, args.run)
    path = export(trainer.shape, trainer.params, args.out, max_position=recipe.max_position, dtype=args.dtype)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"step {trainer.step} written to {path}, {size:,} bytes")


if __name__ == "__main__":
    main()
