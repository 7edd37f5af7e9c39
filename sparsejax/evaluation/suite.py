"""What is asked: named cases (a task with its options), lengths, samples, and the suites made of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import make_sample
from sparsejax.evaluation.tasks.sample import Turn

NEEDLES = {"filler": "needle"}
HALF = {"filler": "needle", "density": 0.5}

# Name -> task and options. `_dense`: all other lines are facts of the asked kind; `_half`: half of them are.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "niah_single": ("niah_single", {}),
    "niah_single_noise": ("niah_single", {"filler": "noise"}),
    "niah_single_dense": ("niah_single", NEEDLES),
    "niah_multikey": ("niah_multikey", {}),
    "niah_multikey_half": ("niah_multikey", HALF),
    "niah_multikey_dense": ("niah_multikey", NEEDLES),
    "kv": ("kv", {"filler": "markov"}),
    "kv_half": ("kv", HALF),
    "kv_dense": ("kv", NEEDLES),
    "niah_multiquery": ("niah_multiquery", {}),
    "niah_multiquery_dense": ("niah_multiquery", NEEDLES),
    "niah_multivalue": ("niah_multivalue", {}),
    "niah_multivalue_dense": ("niah_multivalue", NEEDLES),
    "vt_2_hops": ("vt", {"hops": 2}),
    "vt_4_hops": ("vt", {"hops": 4}),
    "vt_3_chains": ("vt_multichain", {}),
    "qa": ("qa", {}),
    "qa_two_hops": ("qa_two_hops", {}),
    "cwe": ("cwe", {}),
    "fwe": ("fwe", {}),
    "copy": ("copy", {}),
}
CORE = ("niah_single", "niah_single_dense", "niah_multikey", "niah_multikey_dense", "kv", "kv_dense")
SPREAD = (
    *CORE,
    *("niah_multiquery", "niah_multivalue", "vt_2_hops", "vt_4_hops", "vt_3_chains"),
    *("qa", "qa_two_hops", "cwe", "fwe", "copy"),
)


@dataclass(frozen=True)
class Suite:
    """Cases times lengths, `samples` documents each; `seed` is the first document's, the others count up."""

    cases: tuple[str, ...] = SPREAD
    lengths: tuple[int, ...] = (512, 1024, 2048)
    samples: int = 32
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
QUICK = Suite(("niah_single", "niah_multikey_dense", "kv_dense", "vt_2_hops", "qa"), lengths=(512, 1024), samples=16)


@dataclass(frozen=True)
class Cell:
    """One case at one length: prompts as token ids, the question of each, and room for the longest reply."""

    case: str
    length: int
    prompts: tuple[tuple[int, ...], ...] = field(repr=False)
    turns: tuple[Turn, ...] = field(repr=False)
    max_tokens: int


def make_cell(case: str, length: int, samples: int, seed: int, tokenizer: Any) -> Cell:
    """The documents of a cell; the same arguments give the same documents everywhere.

    Raises:
        ConfigError: the case does not fit the length under this tokenizer.
    """
    task, options = CASES[case]
    seeds = range(seed, seed + samples)
    made = [make_sample(task, length=length, seed=one, tokenizer=tokenizer, **options) for one in seeds]
    turns = tuple(sample.turns[0] for sample in made)
    prompts = tuple(tuple(tokenizer(sample.segments("Q+")[0]).input_ids) for sample in made)
    longest = max(len(tokenizer(turn.reply, add_special_tokens=False).input_ids) for turn in turns)
    return Cell(case, length, prompts, turns, longest + longest // 2 + 8)
