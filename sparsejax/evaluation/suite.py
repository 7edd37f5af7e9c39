"""What is asked: named cases (a task with its options), lengths, samples, and the suites made of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import make_sample
from sparsejax.evaluation.tasks.sample import Ask, Sample, Turn


class Case(NamedTuple):
    """A task, its options, and the protocol under which it is asked (`Sample.asks`)."""

    task: str
    options: dict[str, Any] = {}
    protocol: str = "Q+"


NEEDLES = {"filler": "needle"}
HALF = {"filler": "needle", "density": 0.5}

# `_dense`: all other lines are facts of the asked kind; `_half`: half of them are. `_later`: the question comes after
# the document is compressed; `_turns`: four of them do.
CASES: dict[str, Case] = {
    "niah_single": Case("niah_single"),
    "niah_single_noise": Case("niah_single", {"filler": "noise"}),
    "niah_single_dense": Case("niah_single", NEEDLES),
    "niah_single_later": Case("niah_single", protocol="Q-"),
    "niah_multikey": Case("niah_multikey"),
    "niah_multikey_half": Case("niah_multikey", HALF),
    "niah_multikey_dense": Case("niah_multikey", NEEDLES),
    "niah_multikey_dense_later": Case("niah_multikey", NEEDLES, "Q-"),
    "niah_multikey_dense_turns": Case("niah_multikey", NEEDLES | {"turns": 4}, "MT"),
    "kv": Case("kv", {"filler": "markov"}),
    "kv_half": Case("kv", HALF),
    "kv_dense": Case("kv", NEEDLES),
    "kv_dense_later": Case("kv", NEEDLES, "Q-"),
    "kv_dense_turns": Case("kv", NEEDLES | {"turns": 4}, "MT"),
    "niah_multiquery": Case("niah_multiquery"),
    "niah_multiquery_dense": Case("niah_multiquery", NEEDLES),
    "niah_multivalue": Case("niah_multivalue"),
    "niah_multivalue_dense": Case("niah_multivalue", NEEDLES),
    "vt_2_hops": Case("vt", {"hops": 2}),
    "vt_4_hops": Case("vt", {"hops": 4}),
    "vt_3_chains": Case("vt_multichain"),
    "vt_16_hops": Case("vt", {"hops": 16}, "LD"),
    "vt_32_hops": Case("vt", {"hops": 32}, "LD"),
    "qa": Case("qa"),
    "qa_two_hops": Case("qa_two_hops"),
    "cwe": Case("cwe"),
    "fwe": Case("fwe"),
    "copy": Case("copy", protocol="LD"),
}
CORE = ("niah_single", "niah_single_dense", "niah_multikey", "niah_multikey_dense", "kv", "kv_dense")
# Both kinds of filler, every protocol, and tasks at which models differ.
SPREAD = (
    *("niah_single", "niah_multikey_dense", "kv_dense"),
    *("niah_multikey_dense_later", "kv_dense_turns", "vt_16_hops"),
    *("niah_multivalue", "vt_4_hops", "qa"),
)


@dataclass(frozen=True)
class Suite:
    """Cases times lengths, `samples` documents each; `seed` is the first document's, the others count up."""

    cases: tuple[str, ...] = SPREAD
    lengths: tuple[int, ...] = (1024,)
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for case in self.cases:
            if case not in CASES:
                raise ConfigError(f"case {case!r} is unknown; known are {', '.join(CASES)}")
        if not self.cases or not self.lengths or min(self.lengths) < 1 or self.samples < 1:
            raise ConfigError("a suite needs at least one case, one length above 0 and one sample")

    def within(self, longest: int) -> Suite:
        """The suite without the lengths above `longest`."""
        return replace(self, lengths=tuple(length for length in self.lengths if length <= longest) or (longest,))


DEFAULT = Suite()
QUICK = Suite(("niah_single", "niah_multikey_dense_later", "kv_dense", "qa"), samples=8)


@dataclass(frozen=True)
class Request:
    """One question as the engine gets it; `compress_at` of the tokens are compressed before the rest is read."""

    token_ids: tuple[int, ...]
    compress_at: int
    turn: Turn

    @property
    def prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.token_ids), "compress_at": self.compress_at}


@dataclass(frozen=True)
class Cell:
    """One case at one length: the requests of each document, and room for the longest reply."""

    case: str
    length: int
    documents: tuple[tuple[Request, ...], ...] = field(repr=False)
    max_tokens: int

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(request for document in self.documents for request in document)


def make_cell(case: str, length: int, samples: int, seed: int, tokenizer: Any) -> Cell:
    """The documents of a cell; the same arguments give the same documents everywhere.

    Raises:
        ConfigError: the case does not fit the length under this tokenizer.
    """
    task, options, protocol = CASES[case]
    seeds = range(seed, seed + samples)
    made = [make_sample(task, length=length, seed=one, tokenizer=tokenizer, **options) for one in seeds]
    documents = tuple(make_requests(sample, protocol, tokenizer) for sample in made)
    replies = (request.turn.reply for document in documents for request in document)
    longest = max(len(tokenizer(reply, add_special_tokens=False).input_ids) for reply in replies)
    return Cell(case, length, documents, longest + longest // 2 + 8)


def make_requests(sample: Sample, protocol: str, tokenizer: Any) -> tuple[Request, ...]:
    """The requests of one document under a protocol."""
    return tuple(_request(ask, tokenizer) for ask in sample.asks(protocol))


def _request(ask: Ask, tokenizer: Any) -> Request:
    """A token that spans the end of the head belongs to the rest, so the tokens are those of Q+."""
    tokens, head = tuple(tokenizer(ask.text).input_ids), tokenizer(ask.head).input_ids
    same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, head, strict=False))
    return Request(tokens, sum(1 for _ in same), ask.turn)
