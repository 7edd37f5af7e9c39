"""Conversations over HTTP: a name comes back with the answer, and the next request goes on under it."""

from __future__ import annotations

import openai
import pytest

from tests.serve.live import MODEL

TALK = [{"role": "user", "content": " box: 204;\nWhat is the value of box?"}]


def test_a_turn_goes_on_from_the_one_before(client, http):
    ids = client.post("../tokenize", body={"prompt": " box: 204; lamp: 311;\nQ: What"}, cast_to=dict)["tokens"]
    common = dict(model=MODEL, max_tokens=6, temperature=0)
    keeping = {"keep_alive": 60, "return_token_ids": True, "ignore_eos": True}
    first = client.completions.create(prompt=ids, extra_body=keeping, **common).choices[0]
    name, said = first.conversation, ids + first.token_ids
    second = client.completions.create(prompt=[*said, 5, 6], extra_body={**keeping, "conversation": name}, **common)
    assert second.usage.prompt_tokens_details.cached_tokens == len(said) - 1
    assert second.choices[0].conversation == name
    assert 'sparsejax:kv_kept_pages{engine="0",model_name="' in http.get("/metrics").text
    said = [*said, 5, 6, *second.choices[0].token_ids]
    with pytest.raises(openai.BadRequestError, match="does not extend") as refused:
        client.completions.create(prompt=ids, extra_body={"conversation": name}, **common)
    assert (refused.value.code, refused.value.param) == ("conversation_mismatch", "prompt")
    last = client.completions.create(prompt=said, extra_body={"conversation": name}, **common)
    assert not hasattr(last.choices[0], "conversation")
    with pytest.raises(openai.NotFoundError, match="not kept") as gone:
        client.completions.create(prompt=said, extra_body={"conversation": name}, **common)
    assert gone.value.code == "conversation_gone"


def test_a_streamed_chat_tells_its_name_at_the_end_and_takes_one_turn_at_a_time(client):
    keeping = {"keep_alive": 60, "return_token_ids": True, "ignore_eos": True}
    chat = client.chat.completions.create(
        model=MODEL, messages=TALK, max_tokens=6, temperature=0, stream=True, extra_body=keeping
    )
    chunks = [chunk.choices[0] for chunk in chat]
    names = [getattr(choice, "conversation", None) for choice in chunks]
    assert names[-1] and not any(names[:-1])
    whole = client.chat.completions.create(
        model=MODEL, messages=TALK, max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
    )
    said = whole.prompt_token_ids + [token for choice in chunks for token in getattr(choice, "token_ids", ())]
    body = {"conversation": names[-1], "ignore_eos": True}
    with client.completions.create(model=MODEL, prompt=said, max_tokens=400, stream=True, extra_body=body) as running:
        next(iter(running))
        with pytest.raises(openai.ConflictError, match="another request") as refused:
            client.completions.create(model=MODEL, prompt=said, max_tokens=1, extra_body=body)
        assert refused.value.code == "conversation_busy"
        for _ in running:
            pass
