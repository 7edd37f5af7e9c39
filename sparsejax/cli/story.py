"""One long document, several questions, every policy side by side: answers, KV bytes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.cli import show

BUDGET = 0.25
TASK, LENGTH, QUESTIONS, ROOM = "niah_dense", 2048, 4, 256
NEW_TOKENS = 24
FEW = ("dense", "window", "quest", "snapkv", "keydiff", "int4")
HEAD = ("policy", "answers", "KV held", "read by a step", "ms per token")


@dataclass(frozen=True)
class Line:
    """What one policy did: replies with whether each is right, bytes of a decode step, and its time."""

    label: str
    replies: tuple[tuple[str, bool], ...]
    held: float
    read: float
    seconds: float

    @property
    def right(self) -> int:
        return sum(good for _, good in self.replies)


def policies(every: bool = False) -> dict[str, tuple[Any, ...]]:
    """A few presets of each kind or every one, those that take a budget with a quarter of the document, by the codec
    of the engine they need. Each more is compiled into the engine's steps."""
    from sparsejax.evaluation.policies import ANY_MODEL, by_store, make_policies

    return by_store(make_policies(ANY_MODEL if every else FEW, budgets=(BUDGET,)))


def tell(engine: Any, chosen: Sequence[Any]) -> list[Line]:
    """Serves the document and its questions under each of the policies that the engine declared."""
    from sparsejax import SamplingParams
    from sparsejax.evaluation.runner import measure_kv

    requests = document(engine)
    lines = []
    for policy in chosen:
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop=["\n"], sparsity=policy.sparsity)
        outputs = engine.generate([one.prompt for one in requests], params, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        replies = tuple((text, one.turn.score(text)) for text, one in zip(texts, requests, strict=True))
        cost = measure_kv(engine, policy, requests[0])
        lines.append(Line(policy.label, replies, cost.held, cost.read, cost.seconds))
    return lines


def document(engine: Any) -> tuple[Any, ...]:
    """Its questions as requests; the document is compressed before the first of them is read."""
    from sparsejax.evaluation.suite import make_requests
    from sparsejax.evaluation.tasks import make_sample

    length = min(LENGTH, engine.max_model_len - ROOM)
    made = make_sample(TASK, length=length, seed=0, tokenizer=engine.tokenizer, keys=QUESTIONS, turns=QUESTIONS)
    return make_requests(made, "MT", engine.tokenizer)


def as_text(lines: Sequence[Line], num_tokens: int) -> str:
    """The table, dense first, and what it means."""
    rows: list[tuple[str, ...]] = [HEAD]
    for line in lines:
        replies = (show.shorten(text, 16) for text, _ in line.replies)
        marked = (text if good else f"[{text}]" for text, (_, good) in zip(replies, line.replies, strict=True))
        rows.append(
            (
                line.label,
                f"{line.right} of {len(line.replies)}: {'  '.join(marked)}",
                show.size(line.held),
                show.size(line.read),
                f"{1e3 * line.seconds:.1f}",
            )
        )
    return (
        f"A document of {num_tokens} tokens, every line a fact, and {QUESTIONS} questions asked one after the other\n"
        f"under each policy, at a budget of {BUDGET:.0%} where it takes one ([wrong answers] in brackets):\n"
        f"{show.table(rows)}"
    )
