"""Selection over DeltaKV: filter layers choose, layers of latents follow; what does not go together is refused."""

from __future__ import annotations

import dataclasses

import pytest

from sparsejax import SamplingParams
from sparsejax.errors import ConfigError, ModelError, RequestError
from sparsejax.sparsity.policy import SparsityConfig, declared
from tests.cache.test_latent import random_compressor, saved
from tests.engine.models import random_prompts, tiny_engine, tiny_model

PROMPTS = random_prompts(5, (3, 150, 40, 230, 90))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0)
SMALL = {"budget": 64, "sink": 16, "recent": 16}
QUEST = {"preset": "quest", "filter_layers": "auto", **SMALL}


def asking(sparsity) -> SamplingParams:
    return dataclasses.replace(GREEDY, sparsity=sparsity)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory: pytest.TempPathFactory):
    """The compressor of layer 1 only: layers 0 and 2 filter."""
    return saved(tmp_path_factory.mktemp("compressor"), model, random_compressor())


@pytest.fixture(scope="module")
def engine(model, whole):
    preset = {"preset": "deltakv", "compressor": whole["compressor"]}
    with tiny_engine(model, sparsity=(whole, preset, QUEST), max_num_seqs=4) as engine:
        yield engine


@pytest.mark.slow
def test_every_policy_gives_in_a_mixed_batch_what_it_gives_alone(engine):
    """And a budget that covers the sequence reads everything; a small one does not."""
    chosen = (None, "deltakv", {"preset": "deltakv", **SMALL}, QUEST)
    requests = [(prompt, asking(one)) for one in chosen for prompt in PROMPTS]
    alone = [tokens(engine.generate(prompt, params))[0] for prompt, params in requests]
    together = tokens(engine.generate([prompt for prompt, _ in requests], [params for _, params in requests]))
    assert together == alone
    everything, covered, omnikv, quest = (alone[i : i + len(PROMPTS)] for i in range(0, len(alone), len(PROMPTS)))
    assert covered == everything
    assert omnikv[0] == quest[0] == everything[0]
    assert len({tuple(answers[3]) for answers in (everything, omnikv, quest)}) > 1


def test_a_small_budget_reads_fewer_bytes(engine):
    read = []
    for sparsity in ("deltakv", {"preset": "deltakv", **SMALL}):
        before = engine.stats()["decode_read_bytes"]
        engine.generate(PROMPTS[3], asking(sparsity))
        read.append(engine.stats()["decode_read_bytes"] - before)
    assert read[1] < 0.9 * read[0]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("int4", "stores its pages as deltakv, not as int4"),
        ("snapkv", "evict nothing, or take another codec"),
        ("quest", "layers of latents cannot select"),
        ({"preset": "omnikv", "filter_layers": [0, 1]}, r"layers \[1\] hold latents .* choose of \(0, 2\)"),
        ({"preset": "omnikv", "recall_every": 4}, "nothing can be measured"),
        ({"preset": "deltakv", "compressor": "elsewhere"}, "not with 'elsewhere': leave it out"),
        ({"preset": "deltakv", "filter_codec": "fp8"}, "filter_codec=None, not with 'fp8'"),
    ],
)
def test_a_request_that_the_engine_does_not_serve_is_refused(engine, sparsity, message):
    with pytest.raises(RequestError, match=message) as caught:
        engine.generate([1, 2], SamplingParams(sparsity=sparsity))
    assert caught.value.parameter == "sparsity"


def test_an_engine_that_cannot_be_is_refused(model, whole, tmp_path):
    cases = (
        (dict(), dict(sparsity="deltakv"), ConfigError, "there is none beside it: train one"),
        (dict(), dict(sparsity=whole, page_size=32), ConfigError, "set page_size=16"),
        (dict(), dict(sparsity={"preset": "deltakv", "compressor": str(tmp_path)}), ModelError, "compressor.json"),
        (dict(), dict(sparsity=(whole, "snapkv")), ConfigError, "evict nothing, or take another codec"),
        (dict(kv_heads=4), dict(sparsity=whole), ModelError, r"num_kv_heads 2 \(the model has 4\)"),
        (dict(vocab_size=211), dict(sparsity=whole), ModelError, "trained for another model: base_model"),
    )
    for change, settings, error, message in cases:
        with pytest.raises(error, match=message):
            tiny_engine(tiny_model(layers=3, **change) if change else model, **settings)


def test_a_compressed_layer_with_a_window_is_refused(tmp_path):
    model = tiny_model(layers=3)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(None, 64, None)))
    with pytest.raises(ConfigError, match=r"layers \[1\] of this model see a sliding window"):
        tiny_engine(model, sparsity=saved(tmp_path, model, random_compressor()))


def test_settings_of_the_codec_are_checked_and_shared():
    with pytest.raises(ConfigError, match="compressor='here' belongs to codec='deltakv'"):
        SparsityConfig(codec="int4", compressor="here")
    with pytest.raises(ConfigError, match="filter_codec='deltakv' is not one of"):
        SparsityConfig(codec="deltakv", filter_codec="deltakv")
    with pytest.raises(ConfigError, match="an engine has one"):
        declared(({"preset": "deltakv", "compressor": "a"}, {"preset": "deltakv", "compressor": "b"}))
    both = declared(({"preset": "deltakv", "compressor": "a"}, "omnikv"))
    assert [(one.codec, one.compressor) for one in both] == [("deltakv", "a")] * 2
