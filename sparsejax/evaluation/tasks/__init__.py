"""Task generators: synthetic long-context texts of an exact token length with questions that have one right answer.

>>> sample = make_sample("niah_multikey", length=1024, seed=7, tokenizer=tokenizer)
>>> sample.turns[0].score(reply)

Texts are made for any tokenizer. The same task, length, seed and options give the same text everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks.compose import Plan, compose, token_counter
from sparsejax.evaluation.tasks.counting import common_words, copy_list, frequent_words
from sparsejax.evaluation.tasks.questions import question_answering
from sparsejax.evaluation.tasks.retrieval import niah, variable_tracking
from sparsejax.evaluation.tasks.sample import PROTOCOLS, Ask, Sample, Turn

TASKS: dict[str, tuple[Callable[..., Plan], dict[str, Any]]] = {
    "niah_single": (niah, {"keys": 1}),
    "niah_multikey": (niah, {"keys": 4}),
    "niah_dense": (niah, {"keys": 4, "filler": "needle"}),
    "niah_multivalue": (niah, {"keys": 1, "values": 3}),
    "niah_multiquery": (niah, {"keys": 4, "queries": 3}),
    "kv": (niah, {"keys": 4, "filler": "needle", "template": "pair"}),
    "vt": (variable_tracking, {"chains": 1, "hops": 3}),
    "vt_multichain": (variable_tracking, {"chains": 3, "hops": 3}),
    "cwe": (common_words, {}),
    "fwe": (frequent_words, {}),
    "qa": (question_answering, {}),
    "qa_two_hops": (question_answering, {"hops": 2}),
    "copy": (copy_list, {}),
}

__all__ = ["PROTOCOLS", "TASKS", "Ask", "Sample", "Turn", "make_sample"]


def make_sample(task: str, *, length: int, seed: int, tokenizer: Any, **options: Any) -> Sample:
    """One sample of a task, exactly `length` tokens long up to where the first reply begins.

    Args:
        task: a name of `TASKS`.
        length: tokens of context and first question, with the special tokens that the tokenizer adds.
        seed: any integer; the sample depends on it, the task and the length only (and on `options`).
        tokenizer: a transformers tokenizer; texts themselves are plain English.
        options: what the task takes, in place of its defaults (``keys``, ``values``, ``filler``, ``density``,
            ``turns`` ...).

    Raises:
        ConfigError: the task is unknown, the options contradict each other, or the facts do not fit the length.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; known are {', '.join(TASKS)}")
    builder, defaults = TASKS[task]
    rng = random.Random(f"{task}:{length}:{seed}")
    plan = builder(rng, **(defaults | options))
    return compose(task, seed, length, plan, rng, token_counter(tokenizer))
