"""What is kept of a conversation between two turns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sparsejax.engine.prompts import Prompt
from sparsejax.errors import ConversationError

if TYPE_CHECKING:
    from sparsejax.engine.saved_row import SavedRow


@dataclass(eq=False)
class Conversation:
    """The state after a turn, which never changes: a continuation reads its pages and writes to its own.

    Attributes:
        key: its salt and its name: requests with another salt do not find it.
        tokens: all that was said, `num_prompt` tokens before the newest answer.
        text: the prompt of the newest turn, if it was given as text.
        sparsity: the policy of the first turn as its request gave it, and `compress_at`: tokens after which that
            policy compressed the cache.
        tables: pages by cache group; None once they are given up or went below.
        below: names of its pages in the tiers below the device, once they are there, and `own`: those of them that
            no prompt has.
        row: what the sequence held besides its pages, where the next turn needs it.
        num_computed, shifts, evict_at: as of `Sequence`.
        counted: attention is counted in its pages, so that a continuation has to have them for itself.
        until: when it expires, if nobody continues it.
        busy: a request continues it.
        lost: why its pages were given up.
    """

    key: tuple[str | None, str]
    tokens: list[int]
    num_prompt: int
    text: str | None
    sparsity: Any
    compress_at: int
    tables: list[list[int]] | None
    row: SavedRow | None
    num_computed: int
    shifts: list[int]
    evict_at: int | None
    counted: bool
    until: float
    busy: bool = False
    lost: str = ""
    below: list[bytes] = field(default_factory=list)
    own: list[bytes] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """Pages that it holds on the device; what it keeps of a row counts as one."""
        return sum(map(len, self.tables or ())) + (self.row is not None)

    def extended_by(self, prompt: Prompt, tokenizer: Any = None) -> Prompt:
        """`prompt`, which begins with all that was said, token for token or as one text.

        Raises:
            ConversationError: it begins with something else.
        """
        known, given = self.tokens, prompt.token_ids
        if given[: len(known)] == known:
            return prompt
        if self.text is not None and prompt.text is not None and tokenizer is not None:
            answer = tokenizer.decode(
                known[self.num_prompt :], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if prompt.text.startswith(self.text + answer):
                rest = prompt.text[len(self.text + answer) :]
                return replace(prompt, token_ids=known + tokenizer.encode(rest, add_special_tokens=False))
        at = next((i for i, (a, b) in enumerate(zip(known, given, strict=False)) if a != b), len(given))
        raise ConversationError(
            f"the prompt does not extend conversation {self.key[1]!r}: it has the first {at} of its {len(known)} "
            "tokens. Send the prompt and the answer of the last turn, token for token or as one text, and then what "
            "is new; or leave conversation out, and all of it is computed.",
            parameter="prompt",
            value=at,
            code="conversation_mismatch",
        )
