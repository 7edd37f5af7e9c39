"""Conversations without a device: every turn gets its tokens, and pages are conserved, whatever comes between."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.cache.tiers.store import TieredStore
from sparsejax.engine.prompts import Prompt
from sparsejax.errors import ConversationError, RequestError
from tests.engine.fake import EVICTING, PAGE_BYTES, PYRAMIDS, VOCAB, Leaky, check_pages, expected, greedy, make_core


def finish(core) -> dict:
    """Runs until nothing is left; the last output of each request."""
    done = {}
    while core.has_unfinished:
        done.update({output.request_id: output for output in core.step() if output.finished})
        check_pages(core)
    return done


def ask(core, prompt: list[int], **params):
    core.add("ask", Prompt(None, prompt), greedy(**{"max_tokens": 5, **params}))
    return finish(core)["ask"]


def answered(output) -> list[int]:
    """All that was said in a conversation."""
    return output.prompt_token_ids + output.outputs[0].token_ids


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.integers(32, 60),
    cap=st.sampled_from((None, 9, 100)),
    steps=st.sampled_from((1, 3)),
    whole=st.booleans(),
    kind=st.sampled_from(("plain", "deep", "tiers", "leaky tiers")),
)
def test_every_turn_gets_its_tokens_and_no_page_is_lost(seed, pages, cap, steps, whole, kind):
    rng, now, deep = random.Random(seed), [0.0], kind == "deep"
    deeper = (pages, pages) if deep else ()
    store = Leaky(40 * PAGE_BYTES, 7 * kind.startswith("leaky")) if kind.endswith("tiers") else None
    core = make_core(
        pages, 4, steps=steps, share_whole_pages=whole, conversation_pages=cap, deeper=deeper, store=store
    )
    conversations = core.scheduler.conversations
    conversations.clock = lambda: now[0]
    policies = (None, *EVICTING, *(PYRAMIDS if deep else ()))
    wanted, said, names, stops = {}, {}, {}, 0

    def take(outputs):
        for output in outputs:
            if not output.finished:
                continue
            name, (choice,) = output.request_id, output.outputs
            if choice.finish_reason == "abort":
                continue
            assert choice.token_ids == wanted[name][: len(choice.token_ids)]
            assert len(choice.token_ids) == len(wanted[name]) or choice.finish_reason == "stop"
            if output.conversation is not None:
                said[output.conversation] = answered(output)
        check_pages(core)

    for turn in range(40):
        for index in range(rng.randrange(3)):
            name, new = f"{turn}.{index}", [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
            params = dict(max_tokens=rng.randrange(1, 9), keep_alive=rng.choice((None, 5.0, 1000.0)))
            if rng.random() < 0.3:
                params |= dict(ignore_eos=False, stop_token_ids=list(range(1, VOCAB, 9)))
            old = rng.choice(sorted(said)) if said and rng.random() < 0.6 else None
            prompt = new if old is None else said[old] + new
            if len(prompt) > 100:
                continue
            if old is None:
                params |= dict(sparsity=rng.choice(policies))
            else:
                params |= dict(conversation=old)
            try:
                core.add(name, Prompt(None, prompt), greedy(**params))
            except ConversationError as error:
                stops += error.code == "conversation_gone"
                assert error.code in ("conversation_gone", "conversation_busy")
                continue
            names[name] = old
            wanted[name] = expected(prompt, params["max_tokens"])
        for _ in range(rng.randrange(5)):
            take(core.step())
        if core.request_ids() and rng.random() < 0.2:
            take(core.abort([rng.choice(core.request_ids())]))
        now[0] += rng.random() * 2
    while core.has_unfinished:
        take(core.step())
    held = sum(each.num_pages for each in conversations)
    assert held == conversations.num_pages <= conversations.max_pages
    assert not any(each.busy for each in conversations)
    now[0] += 10_000
    core.step()
    assert len(conversations) == conversations.num_pages == 0
    assert all(allocator.num_live == 0 for allocator in core.scheduler.allocators)
    assert not (store and core.scheduler.restores._fetches)
    core.close()


@pytest.mark.parametrize("policy", (None, *EVICTING))
@pytest.mark.parametrize("whole", (False, True))
def test_a_turn_computes_what_is_new(policy, whole):
    core = make_core(60, share_whole_pages=whole)
    first = ask(core, [3] * 33, keep_alive=9.0, sparsity=policy)
    before = core.counters["computed_tokens"]
    second = ask(core, [*answered(first), 8, 9], conversation=first.conversation, keep_alive=9.0)
    assert second.outputs[0].token_ids == expected([*answered(first), 8, 9], 5)
    assert second.conversation == first.conversation
    # The newest token of the first answer, two new ones and four of the answer; a page more if open ones are not kept.
    computed = core.counters["computed_tokens"] - before
    assert computed <= 3 + 4 + (4 if whole and policy is None else 0) + 1
    assert second.num_cached_tokens == len(answered(first)) + 2 - (computed - 4) or computed == 8
    assert core.counters["continued_tokens"] == second.num_cached_tokens


def test_an_eviction_that_is_due_runs_first():
    """One token of output: the prompt is computed and not yet cut."""
    core = make_core(60)
    first = ask(core, [3] * 33, keep_alive=9.0, sparsity=EVICTING[0], max_tokens=1)
    (kept,) = core.scheduler.conversations
    assert kept.evict_at == kept.num_computed == 33 and kept.shifts == [0]
    second = ask(core, answered(first), conversation=first.conversation, keep_alive=9.0)
    assert second.outputs[0].token_ids == expected(answered(first), 5)
    (kept,) = core.scheduler.conversations
    assert kept.evict_at is None and kept.shifts == [33 - 10]


def test_what_cannot_be_continued_is_refused():
    core, now = make_core(60), [0.0]
    core.scheduler.conversations.clock = lambda: now[0]
    first = ask(core, [3] * 9, keep_alive=5.0)
    turn = Prompt(None, [*answered(first), 4])

    def refused(code: str, prompt: Prompt = turn, **params) -> None:
        with pytest.raises(ConversationError) as error:
            core.add("next", prompt, greedy(**{"conversation": first.conversation, **params}))
        assert error.value.code == code and not core.has_unfinished

    refused("conversation_mismatch", Prompt(None, answered(first)[:-1]))
    refused("conversation_mismatch", Prompt(None, [1, *answered(first)]))
    refused("conversation_gone", conversation="never was")
    refused("conversation_gone", cache_salt="of another tenant")
    with pytest.raises(RequestError, match="sparsity"):
        core.add("next", turn, greedy(conversation=first.conversation, sparsity=EVICTING[0]))
    with pytest.raises(RequestError, match="compress_at"):
        core.add("next", Prompt(None, turn.token_ids, 3), greedy(conversation=first.conversation))
    core.add("one", turn, greedy(conversation=first.conversation, keep_alive=5.0))
    with pytest.raises(ConversationError, match="wait for its end") as error:
        core.add("two", turn, greedy(conversation=first.conversation))
    assert error.value.code == "conversation_busy"
    finish(core)
    refused("conversation_mismatch")  # the same turn once more
    now[0] = 5.0
    with pytest.raises(ConversationError, match="keep_alive"):
        core.extended(turn, greedy(conversation=first.conversation))
    core.step()
    with pytest.raises(ConversationError, match="within its keep_alive"):
        core.extended(turn, greedy(conversation=first.conversation))


def test_parameters_that_contradict_each_other():
    for params in (dict(n=2, temperature=1.0, keep_alive=1.0), dict(n=2, temperature=1.0, conversation="a")):
        with pytest.raises(RequestError, match="one answer"):
            greedy(**params)
    for params in (dict(keep_alive=0.0), dict(keep_alive="long"), dict(conversation=""), dict(conversation=3)):
        with pytest.raises(RequestError, match=next(iter(params))):
            greedy(**params)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        greedy(conversation="a", prompt_logprobs=1)
    with pytest.raises(RequestError, match="conversation_pages=0"):
        ask(make_core(conversation_pages=0), [1], keep_alive=1.0)


@pytest.mark.parametrize("policy", (None, *EVICTING))
def test_an_aborted_turn_leaves_the_conversation_as_it_was(policy):
    core = make_core(60)
    first = ask(core, [3] * 33, keep_alive=9.0, sparsity=policy)
    turn = [*answered(first), *range(20)]
    for steps in range(7):
        core.add("aborted", Prompt(None, turn), greedy(conversation=first.conversation, max_tokens=9))
        for _ in range(steps):
            core.step()
        core.abort(["aborted"])
        check_pages(core)
    again = ask(core, turn, conversation=first.conversation)
    assert again.outputs[0].token_ids == expected(turn, 5)
    assert again.num_cached_tokens == len(answered(first)) - 1
    assert core.scheduler.allocator.num_live == 0 == len(core.scheduler.conversations)


def test_kept_pages_give_way_before_anybody_is_preempted():
    core = make_core(40, conversation_pages=39)
    conversations = core.scheduler.conversations
    first, second, third = (ask(core, [number] * 33, keep_alive=9.0) for number in range(1, 4))
    assert conversations.num_pages == 30
    second = ask(core, [*answered(second), 5], conversation=second.conversation, keep_alive=9.0)
    core.add("long", Prompt(None, [7] * 40), greedy(max_tokens=20))
    core.step()
    assert {each.key[1] for each in conversations} == {second.conversation, third.conversation}
    finish(core)
    assert len(conversations) == 2 and core.scheduler.num_preemptions == 0
    with pytest.raises(ConversationError, match="running requests needed"):
        ask(core, [*answered(first), 5], conversation=first.conversation)
    # What all of them together cannot make room for takes none of them.
    core.add("running", Prompt(None, [8] * 40), greedy(max_tokens=20))
    core.step()
    held = len(conversations)
    core.add("too long for now", Prompt(None, [9] * 117), greedy(max_tokens=2))
    for _ in range(3):
        core.step()
    assert len(conversations) == held and core.scheduler.waiting
    finish(core)
    assert core.scheduler.num_preemptions == 0


@pytest.mark.parametrize("policy", (None, *EVICTING))
@pytest.mark.parametrize("whole", (False, True))
def test_a_conversation_that_gave_way_comes_back_from_below(policy, whole):
    """Pages that they share are held once below, and what nobody can ask for any more is let go."""
    store = TieredStore(60 * PAGE_BYTES)
    core = make_core(31, share_whole_pages=whole, store=store)
    conversations = core.scheduler.conversations
    talks = [ask(core, [3] * 32 + [number], keep_alive=9.0, sparsity=policy) for number in range(3)]
    core.add("crowd", Prompt(None, [7] * 90), greedy(max_tokens=29))
    finish(core)
    assert conversations.counters["lowered"] == 3 and not conversations.counters["dropped"]
    assert sum(each.num_pages for each in conversations) == conversations.num_pages <= 3
    below, own = ([name for each in conversations for name in getattr(each, which)] for which in ("below", "own"))
    assert len(below) - len(set(below)) == (16 if policy is None else 0)
    assert all(map(core.tiers.holds, own)) and own
    before = core.counters["computed_tokens"]
    for talk in talks:
        turn = [*answered(talk), 8, 9]
        output = ask(core, turn, conversation=talk.conversation)
        assert output.outputs[0].token_ids == expected(turn, 5)
        assert output.num_cached_tokens >= len(answered(talk)) - (4 if whole and policy is None else 1)
    assert core.counters["computed_tokens"] - before <= 3 * (3 + 4 + 4)
    assert len(conversations) == core.scheduler.allocator.num_live == 0
    core.close()
    assert not any(name in store.host for name in own)


def test_what_the_tiers_have_no_room_for_is_gone():
    core = make_core(31, store=TieredStore(12 * PAGE_BYTES))
    first = ask(core, [3] * 33, keep_alive=9.0)
    core.add("crowd", Prompt(None, [7] * 119), greedy(max_tokens=1))
    finish(core)
    assert [len(each.below) for each in core.scheduler.conversations] == [10]
    core.extended(Prompt(None, [*answered(first), 8]), greedy(conversation=first.conversation))
    core.add("crowd", Prompt(None, [8] * 119), greedy(max_tokens=1))  # pages of the first one take its place below
    finish(core)
    core.tiers.fetch([]).result()
    with pytest.raises(ConversationError, match="have no room for its pages") as error:
        core.extended(Prompt(None, [*answered(first), 8]), greedy(conversation=first.conversation))
    assert error.value.code == "conversation_gone"
    ask(core, [4] * 33, keep_alive=9.0)
    core.add("crowd", Prompt(None, [9] * 119), greedy(max_tokens=1))
    finish(core)
    with pytest.raises(ConversationError, match="newer ones took its room"):
        core.extended(Prompt(None, [*answered(first), 8]), greedy(conversation=first.conversation))
    core.close()


def test_newer_conversations_take_the_place_of_older_ones():
    core = make_core(60, conversation_pages=21)
    names = [ask(core, [number] * 33, keep_alive=9.0).conversation for number in range(1, 5)]
    assert [each.key[1] for each in core.scheduler.conversations] == names[2:]
    assert ask(core, [1] * 100, keep_alive=9.0).conversation is None  # more than all of them may have
    assert len(core.scheduler.conversations) == 2
    with pytest.raises(ConversationError, match="newer ones"):
        core.extended(Prompt(None, [1]), greedy(conversation=names[0]))
