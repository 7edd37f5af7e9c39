"""Tokenizers and their chat templates, through transformers (imported only when one is loaded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsejax.errors import ModelError
from sparsejax.models.files import find_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    """Whether a model directory brings tokenizer files."""
    return any((path / name).is_file() for name in _FILES)


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a model directory or hub id.

    Raises:
        ModelError: the directory has no tokenizer files, or they cannot be read.
    """
    directory = find_model(path)
    if not has_tokenizer(directory):
        raise ModelError(
            f"{directory} has no tokenizer (none of {', '.join(_FILES)}); copy the model's tokenizer files "
            "there, name another tokenizer, or pass token ids"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"the tokenizer in {directory} cannot be read: {error}") from error
