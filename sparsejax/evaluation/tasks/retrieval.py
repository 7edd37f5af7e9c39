"""Retrieval tasks: needles in a haystack, key-value pairs, variable tracking (forms of RULER, arXiv 2404.06654)."""

from __future__ import annotations

import random

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import templates, words
from sparsejax.evaluation.tasks.compose import Plan
from sparsejax.evaluation.tasks.fillers import Filler, markov_filler, needle_filler, noise_filler
from sparsejax.evaluation.tasks.sample import Turn


class Supply:
    """Keys and values of one document, each handed out once, and every one that was handed out."""

    def __init__(self, rng: random.Random) -> None:
        self.keys = rng.sample(words.NOUNS, len(words.NOUNS))
        self.values = rng.sample(words.VALUES, len(words.VALUES))

    def used_values(self) -> frozenset[str]:
        return frozenset(words.VALUES) - frozenset(self.values)

    def used_keys(self) -> frozenset[str]:
        return frozenset(words.NOUNS) - frozenset(self.keys)


def make_filler(rng: random.Random, kind: str, supply: Supply, template: str, density: float) -> Filler:
    """Filler of a kind: ``noise``, ``markov`` or ``needle`` (a `density` share of its sentences are facts)."""
    if kind == "noise":
        return noise_filler()
    if kind == "markov":
        return markov_filler(rng)
    if kind == "needle":
        return needle_filler(rng, template, supply.keys, supply.values, density)
    raise ConfigError(f"filler {kind!r} is unknown; use noise, markov or needle")


def niah(
    rng: random.Random,
    *,
    filler: str = "markov",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    turns: int = 1,
    density: float = 1.0,
    template: str = "needle",
) -> Plan:
    """Needles in a haystack: `keys` facts groups of `values` each, `queries` keys asked for at once.

    `template` is ``needle`` (a sentence) or ``pair`` (``key: value;``). Each of `turns` asks for other keys.
    """
    if queries * turns > keys:
        raise ConfigError(f"{turns} turns of {queries} queries need at least {queries * turns} keys, not {keys}")
    if queries > 1 and values > 1:
        raise ConfigError("ask for several keys or for several values per key, not both")
    supply = Supply(rng)
    names = [supply.keys.pop() for _ in range(keys)]
    found = {name: [supply.values.pop() for _ in range(values)] for name in names}
    fact = templates.CODE if values > 1 else {"needle": templates.NEEDLE, "pair": templates.PAIR}[template]
    groups = [[fact.format(f" {name}", f" {value}")] for name in names for value in found[name]]
    source = make_filler(rng, filler, supply, fact, density)
    spread = [rng.sample(found[name], values) for name in names]

    def ask() -> tuple[Turn, ...]:
        choices = supply.used_values()
        out = []
        for turn in range(turns):
            asked = slice(turn * queries, (turn + 1) * queries)
            out.append(_niah_turn(names[asked], spread[asked], choices, template))
        return tuple(out)

    return Plan(groups, queries * values, ask, source)


def _niah_turn(names: list[str], found: list[list[str]], choices: frozenset[str], template: str) -> Turn:
    answers = tuple(value for one in found for value in one)
    pairs = [f" {name} {value}" for name, one in zip(names, found, strict=True) for value in one]
    if len(names) > 1:
        prompt = templates.ASK_MANY.format(templates.NEXT.join(f" {name}" for name in names))
    elif len(answers) > 1:
        prompt = templates.ASK_CODES.format(f" {names[0]}")
    else:
        ask = {"needle": templates.ASK_NEEDLE, "pair": templates.ASK_PAIR}[template]
        prompt = ask.format(f" {names[0]}")
    reply = templates.NEXT.join(pairs) + templates.END + "\n"
    return Turn(prompt, answers, choices, len(names) > 1, reply)


def variable_tracking(
    rng: random.Random, *, chains: int = 1, hops: int = 2, turns: int = 1, filler: str = "markov", density: float = 1.0
) -> Plan:
    """A value is copied to one item, from there to the next, `hops` items long; which items hold it?"""
    if turns > chains:
        raise ConfigError(f"{turns} turns need at least as many chains, not {chains}")
    supply = Supply(rng)
    links = [(supply.values.pop(), [supply.keys.pop() for _ in range(hops)]) for _ in range(chains)]
    groups = [
        [templates.ASSIGN.format(f" {one}", f" {two}") for one, two in zip((value, *names), names, strict=False)]
        for value, names in links
    ]
    source = make_filler(rng, filler, supply, templates.ASSIGN_TO_KEY, density)

    def ask() -> tuple[Turn, ...]:
        choices = supply.used_keys()
        return tuple(
            Turn(
                templates.ASK_CHAIN.format(f" {value}"),
                tuple(names),
                choices,
                False,
                f" {value} {' '.join(names)}{templates.END}\n",
            )
            for value, names in links[:turns]
        )

    return Plan(groups, 1, ask, source)
