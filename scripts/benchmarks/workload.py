"""The serving workload: 16 greedy requests of mixed lengths over a random model. Standard library only,
because every contender builds it in its own interpreter.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

LENGTH_SEED = 1717  # 7421 prompt tokens (110 to 1024) and 1519 new ones


@dataclass(frozen=True)
class Workload:
    """``requests`` prompts of ``prompt`` tokens, ``new`` tokens to generate; (low, high) are inclusive."""

    requests: int = 16
    prompt: tuple[int, int] = (64, 1024)
    new: tuple[int, int] = (64, 128)
    vocab_size: int = 32000

    def lengths(self) -> tuple[list[int], list[int]]:
        """Prompt and output lengths. They do not depend on the repetition."""
        draw = random.Random(LENGTH_SEED)
        prompts = [draw.randint(*self.prompt) for _ in range(self.requests)]
        return prompts, [draw.randint(*self.new) for _ in range(self.requests)]

    def make(self, repetition: int) -> list[tuple[list[int], int]]:
        """(prompt token ids, new tokens) per request. Every repetition has other tokens, so that nothing
        can be remembered from one to the next; ids below 3 (special tokens) do not occur.
        """
        draw = random.Random(f"tokens-{repetition}")
        return [
            ([draw.randrange(3, self.vocab_size) for _ in range(prompt)], new)
            for prompt, new in zip(*self.lengths(), strict=True)
        ]

    def warm_up(self, new: int) -> list[tuple[list[int], int]]:
        """Every prompt length of the workload with other tokens, and at most ``new`` tokens to generate."""
        return [(prompt, min(count, new)) for prompt, count in self.make(-1)]

    def describe(self) -> dict:
        prompts, new = self.lengths()
        return {**asdict(self), "prompt_tokens": sum(prompts), "new_tokens": sum(new)}


FULL = Workload()
SMOKE = Workload(requests=4, prompt=(32, 128), new=(8, 16))
TINY = Workload(requests=4, prompt=(8, 32), new=(4, 8), vocab_size=256)
