"""Conversations to prompts, through the model's own chat template."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import RequestError


def render_chat(tokenizer: Any, messages: Any, /, **options: Any) -> dict[str, Any]:
    """One conversation as ``{"prompt": text, "prompt_token_ids": [...]}``.

    Raises:
        RequestError: no tokenizer or no template, or the template refuses the messages.
    """
    from jinja2 import TemplateError

    _check_messages(messages)
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer, and this model directory has none.", parameter="messages")
    if not (options.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise RequestError(
            "this model has no chat template: pass chat_template, or use generate with a plain prompt.",
            parameter="messages",
        )
    options = {name: value for name, value in options.items() if value is not None}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise RequestError(
            f"the chat template refused the messages: {error}.", parameter="messages", value=messages
        ) from error
    # The template has written the special tokens already.
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _check_messages(messages: Any) -> None:
    shape = 'a list of {"role": ..., "content": ...}'
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages is {messages!r}; give {shape}.", parameter="messages", value=messages)
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise RequestError(
                f"message {place} is {message!r}; each one is a mapping with 'role' and 'content'.",
                parameter="messages",
                value=message,
            )
