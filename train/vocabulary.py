"""The compact vocabulary of the embedded model: whole words with bytes underneath.

A token is a byte, a word with its leading space, or a three-digit number with its leading space. Text is split into
such pieces; a piece that is in the vocabulary is one token, any other piece is spelled in bytes. So decoding gives
back every text exactly, whatever it contains.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from sparsejax.evaluation.tasks import words

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPLIT = r" ?\p{L}+| ?\p{N}{1,3}|\s|[^\s\p{L}\p{N}]"
PUNCTUATION = (".", ",", ":", ";", "?", "\n")

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- set parts = message.content.split('\\n') -%}"
    "{{- parts[:-1] | join('\\n') -}}"
    "{{- '\\nQ: ' + parts[-1].strip() + '\\nA:' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- ' ' + message.content.strip() -}}"
    "{%- else -%}"
    "{{- message.content -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte value in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + index) for index, byte in enumerate(hidden)}


def token_strings() -> list[str]:
    """All tokens in id order, spelled as plain text (bytes excepted: those come as their letter)."""
    letters = byte_letters()
    spelled = {text: "".join(letters[byte] for byte in text.encode()) for text in _pieces()}
    tokens = [PAD, BOS, EOS, *(letters[byte] for byte in range(256))]
    known = set(tokens)
    tokens += [token for token in spelled.values() if token not in known]
    return tokens


def _pieces() -> list[str]:
    spaced = (
        *words.FUNCTION_WORDS,
        *words.LINE_STARTERS,
        *words.PREPOSITIONS,
        *words.VERBS,
        *words.COLORS,
        *words.ADJECTIVES,
        *words.NOUNS,
        *words.VALUES,
    )
    return list(dict.fromkeys([*PUNCTUATION, *words.LINE_STARTERS, *(f" {word}" for word in spaced)]))


def build_tokenizer() -> Tokenizer:
    """The tokenizer, built from the word lists alone; no text is needed."""
    vocabulary = {token: index for index, token in enumerate(token_strings())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def save_tokenizer(path: str | Path, max_length: int = 4096) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers' AutoTokenizer loads the folder."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
