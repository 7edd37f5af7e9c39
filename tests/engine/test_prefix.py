"""A hit is a cold start, bit for bit: tokens and log-probabilities, wherever the prompt is split."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from sparsejax import SamplingParams
from sparsejax.errors import RequestError
from tests.cache.test_latent import stored_as
from tests.engine.models import random_prompts, tiny_engine

(PROMPT,) = random_prompts(0, (150,))
(OTHER,) = random_prompts(1, (150,))
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, n=3, logprobs=2)
LENGTHS = (16, 17, 47, 64, 100, 150)


caching = functools.partial(tiny_engine, enable_prefix_caching=True)


def bits(output) -> list:
    """Tokens and log-probabilities, unrounded."""
    return [
        (choice.token_ids, [[(token, entry.logprob) for token, entry in step.items()] for step in choice.logprobs])
        for choice in output.outputs
    ]


SLOW = tuple(pytest.param(codec, marks=pytest.mark.slow) for codec in ("int8", "fp8", "deltakv"))


@pytest.fixture(scope="module", params=["dense", "int4", *SLOW])
def engines(request, tmp_path_factory):
    """One engine that caches prefixes and one that does not."""
    sparsity = stored_as(request.param, tmp_path_factory)
    with caching(sparsity=sparsity) as warm, tiny_engine(sparsity=sparsity) as cold:
        yield warm, cold


def test_at_every_split(engines):
    """Prompts that share 1 to 150 tokens with what is cached, first alone and then among others."""
    warm, cold = engines
    whole = warm.core.scheduler.limits.share_whole_pages
    warm.generate(PROMPT, GREEDY)
    prompts = [PROMPT[:n] for n in LENGTHS] + [PROMPT[:n] + OTHER[n : n + 30] for n in LENGTHS]
    wanted = [bits(cold.generate(prompt, GREEDY)[0]) for prompt in prompts]
    known = [min(n, 144) for n in (*(n - 1 for n in LENGTHS), *LENGTHS)]  # of what is cached, full pages
    for prompt, answer, shared in zip(prompts, wanted, known, strict=True):
        (output,) = warm.generate(prompt, GREEDY)
        assert output.num_cached_tokens >= (shared // 16 * 16 if whole else shared)
        assert bits(output) == answer
    # Together they are rows of another program, which may round differently: the same tokens.
    together = [[tokens for tokens, _ in bits(output)] for output in warm.generate(prompts, GREEDY)]
    assert together == [[tokens for tokens, _ in answer] for answer in wanted]
    assert warm.stats()["prefix_cache_hits"] > 0.8 * sum(LENGTHS)
    assert warm.stats()["kv_live_pages"] == cold.stats()["kv_idle_pages"] == 0


def test_samples_aborts_and_little_room(engines):
    warm, cold = engines
    prompts = [PROMPT[:90] + OTHER[n : n + 20] for n in range(0, 60, 10)]
    wanted = [bits(cold.generate(prompt, SEEDED)[0]) for prompt in prompts]
    allocator = warm.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 13)
    for steps in (2, 5):
        for index, prompt in enumerate(prompts):
            warm.add_request(f"{index}", prompt, SEEDED)
        for _ in range(steps):
            warm.step()
        warm.abort([f"{index}" for index in range(0, len(prompts), 2)])
        while warm.has_unfinished():
            warm.step()
    before = warm.stats()["prefix_cache_hits"]
    outputs = warm.generate(prompts, SEEDED)
    allocator.release(taken)
    assert [[tokens for tokens, _ in bits(output)] for output in outputs] == [[t for t, _ in one] for one in wanted]
    assert warm.stats()["prefix_cache_hits"] > before
    assert warm.stats()["kv_live_pages"] == 0


def test_the_next_turn_of_a_chat(engines):
    warm, cold = engines
    talk = OTHER[:50]
    for turn in range(3):
        (output,) = warm.generate(talk, GREEDY)
        (wanted,) = cold.generate(talk, GREEDY)
        assert bits(output) == bits(wanted)
        assert turn == 0 or output.num_cached_tokens >= (len(talk) - 25) // 16 * 16
        talk = talk + output.outputs[0].token_ids + PROMPT[turn : turn + 19]


def test_prompt_logprobs_read_the_whole_prompt(engines):
    warm, _ = engines
    params = dataclasses.replace(GREEDY, prompt_logprobs=1)
    warm.generate(PROMPT, GREEDY)
    (output,) = warm.generate(PROMPT, params)
    assert output.num_cached_tokens == 0 and len(output.prompt_logprobs) == len(PROMPT)


@pytest.mark.slow
def test_policies_read_the_prefixes_of_each_other():
    """Selecting and evicting requests find the dense prompt; what they select or evict afterwards is theirs."""
    policies = [
        {"preset": "quest", "budget": 48, "recent": 16},
        {"preset": "snapkv", "budget": 40, "sink": 3, "recent": 12, "window": 12, "pool": 3},
        {"preset": "keydiff", "budget": 40, "recent": 12},
        {"preset": "h2o", "budget": 40, "sink": 3, "recent": 12, "interval": 17, "window": 12},
    ]
    skipped = (144, 138, 144, 0)
    declared = ["dense", *policies]
    with caching(sparsity=declared) as warm, tiny_engine(sparsity=declared) as cold:
        warm.generate(PROMPT, GREEDY)
        for _ in range(2):
            for policy, most in zip(policies, skipped, strict=True):
                params = dataclasses.replace(GREEDY, max_tokens=30, sparsity=policy)
                (output,) = warm.generate(PROMPT, params)
                assert output.num_cached_tokens == most, policy
                assert bits(output) == bits(cold.generate(PROMPT, params)[0]), policy
            assert bits(warm.generate(PROMPT, GREEDY)[0]) == bits(cold.generate(PROMPT, GREEDY)[0])


def test_salts_of_tenants():
    with caching() as engine:
        seen = []
        for salt in ("one", "two", None, "one"):
            (output,) = engine.generate(PROMPT, dataclasses.replace(GREEDY, cache_salt=salt))
            seen.append(output.num_cached_tokens)
        assert seen == [0, 0, 0, 144]
        with pytest.raises(RequestError, match="cache_salt"):
            SamplingParams(cache_salt="")


@pytest.mark.parametrize(
    ("codec", "names"),
    (
        ("dense", ("keydiff",)),
        pytest.param("dense", ("snapkv", "expected_attention", "random_keep"), marks=pytest.mark.slow),
        pytest.param("int8", ("keydiff", "snapkv"), marks=pytest.mark.slow),
    ),
)
def test_questions_on_a_document_start_from_what_its_eviction_left(codec, names):
    policies = [{"preset": name, "budget": 48, "sink": 3, "recent": 12, "window": 12, "pool": 3} for name in names]
    declared = [codec, *policies]
    prompts = [{"prompt_token_ids": PROMPT + OTHER[n : n + 20], "compress_at": 150} for n in range(0, 80, 20)]
    with caching(sparsity=declared, num_decode_steps=3) as warm, tiny_engine(sparsity=declared) as cold:
        for policy in policies:
            params = dataclasses.replace(GREEDY, max_tokens=20, sparsity=policy)
            wanted = [bits(cold.generate(prompt, params)[0]) for prompt in prompts]
            for turn in range(2):
                outputs = [warm.generate(prompt, params)[0] for prompt in prompts]
                assert [bits(output) for output in outputs] == wanted
                assert [output.num_cached_tokens for output in outputs][1 - turn :] == [150] * (3 + turn)
            salted = dataclasses.replace(params, cache_salt=policy["preset"])
            together = warm.generate(prompts, salted)
            assert [tokens for o in together for tokens, _ in bits(o)] == [t for one in wanted for t, _ in one]
            assert [output.num_cached_tokens for output in together] == [0, 150, 150, 150]
        assert warm.stats()["kv_live_pages"] == 0
