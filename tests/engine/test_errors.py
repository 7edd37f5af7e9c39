"""Bad input gets a typed error that names the fix, before anything starts, and the engine serves on."""

from __future__ import annotations

import os

import pytest

from sparsejax import Engine, SamplingParams
from sparsejax.errors import CapacityError, ConfigError, ModelError, RequestError, StoreError
from tests.engine.models import VOCAB, tiny_engine, tiny_model

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def engine():
    with tiny_engine(kv_memory_bytes=12 * 2 * 2 * 2 * 16 * 16 * 4) as engine:
        yield engine


@pytest.mark.parametrize(
    "prompt,error,message",
    [
        ([[]], RequestError, "prompt is empty: give at least one token"),
        ("", RequestError, "no tokenizer"),
        ("text", RequestError, "no tokenizer: pass token ids"),
        ([PROMPT, [VOCAB]], RequestError, rf"token 0 is {VOCAB}, outside the vocabulary of {VOCAB} ids"),
        ([PROMPT, [4, -1]], RequestError, "token 1 is -1"),
        ([[1.5]], RequestError, "token ids are integers"),
        ({"text": "x"}, RequestError, "give 'prompt' or 'prompt_token_ids'"),
        ({"prompt_token_ids": PROMPT, "compress_at": 4}, RequestError, "compress_at=4 .*1 to the 3 tokens"),
        ({"prompt_token_ids": PROMPT, "compress_at": 0}, RequestError, "compress_at=0 is not allowed"),
        (7, RequestError, "a prompt is a int; give text, a list of token ids"),
        ([1] * 512, RequestError, "the prompt has 512 tokens.*leaves room for at most 511"),
        ([1] * 400, CapacityError, r"may reach 416 tokens = 26 pages of 16, but the KV pool has 11"),
    ],
)
def test_bad_prompts(engine, prompt, error, message):
    with pytest.raises(error, match=message):
        engine.generate(prompt, SamplingParams(max_tokens=16))
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    "params,message",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(n=0), "n"),
        (dict(n=2, temperature=0.0), "n"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(min_tokens=9, max_tokens=4), "min_tokens"),
        (dict(logprobs=21), "logprobs"),
        (dict(stop_token_ids=[VOCAB]), "stop_token_ids"),
        (dict(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (dict(allowed_token_ids=[]), "allowed_token_ids"),
    ],
    ids=str,
)
def test_bad_sampling_parameters_name_the_parameter(engine, params, message):
    with pytest.raises(RequestError, match=message) as caught:
        engine.generate(PROMPT, params)
    assert caught.value.parameter == message
    assert not engine.has_unfinished()


def test_no_prompts_no_outputs(engine):
    assert engine.generate([]) == []


def test_a_bad_request_does_not_disturb_its_neighbours(engine):
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    (alone,) = engine.generate(PROMPT, greedy)
    engine.add_request("good", PROMPT, greedy)
    engine.step()
    with pytest.raises(RequestError):
        engine.add_request("bad", [VOCAB + 1], greedy)
    with pytest.raises(RequestError, match="'good' is in use"):
        engine.add_request("good", PROMPT, greedy)
    last = None
    while engine.has_unfinished():
        for output in engine.step():
            last = output
    assert last.request_id == "good"
    assert last.outputs[0].token_ids == alone.outputs[0].token_ids


def test_one_bad_prompt_of_many_starts_none(engine):
    requests = engine.stats()["num_requests"]
    with pytest.raises(RequestError):
        engine.generate([PROMPT, PROMPT, [VOCAB]], SamplingParams())
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        engine.generate(PROMPT, [SamplingParams()] * 2)
    with pytest.raises(RequestError, match="stream takes one prompt, 2 were given"):
        engine.stream([PROMPT, PROMPT])
    assert engine.stats()["num_requests"] == requests


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(page_sise=16), "did you mean 'page_size'"),
        (dict(page_size=20), "16, 32, 64, 128"),
        (dict(dtype="float16"), "float32"),
        (dict(warmup="some"), "'none', 'lazy', 'full'"),
        (dict(max_num_seqs=0), "at least 1"),
        (dict(max_num_seqs=8, max_num_batched_tokens=8), "raise it to at least 9"),
        (dict(memory_utilization=1.5), r"\(0, 1\]"),
        (dict(max_model_len=1000), "exceeds what the model was made for .512 positions."),
        (dict(max_model_len="8k"), "must be an integer"),
        (dict(sparsity="quests"), "did you mean .quest."),
        (dict(tensor_parallel_size=2), "not supported by this version"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_engine(**settings)


def test_a_pool_without_room_for_a_page():
    with pytest.raises(CapacityError, match="kv_memory_bytes of at least"):
        tiny_engine(kv_memory_bytes=1000)


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        Engine(str(tmp_path))


def test_a_compile_cache_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="cannot be written"):
        tiny_engine(compile_cache_dir=str(file / "below"))
    if os.geteuid():  # the superuser may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(StoreError, match="give a directory that you may write"):
            tiny_engine(compile_cache_dir=str(locked))


def test_use_after_shutdown():
    engine = Engine.from_loaded(tiny_model(), warmup="none")
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(ConfigError, match="was shut down"):
        engine.generate(PROMPT)
