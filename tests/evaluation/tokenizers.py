"""Tokenizers for task tests: the compact one, and one that knows bytes only."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.vocabulary import byte_letters, save_tokenizer


@functools.cache
def tokenizer(name: str) -> Any:
    """``compact`` (whole words) or ``bytes``."""
    if name == "compact":
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(folder)
            return PreTrainedTokenizerFast.from_pretrained(folder)
    raw = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in byte_letters().items()}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)
