"""Whole models through the paged, batched engine: the tokens and log-probabilities of transformers."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejax import Engine, SamplingParams
from tests.models import golden


@pytest.mark.parametrize("name", golden.names())
def test_a_batch_of_six_prompts_gives_the_tokens_of_transformers(name, tmp_path):
    record = golden.load(name)
    path = golden.write_model(record, tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=len(record.tokens[0]), logprobs=0, ignore_eos=True)
    with Engine(
        str(path),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        page_size=16,
        num_decode_steps=1,
        warmup="none",
    ) as engine:
        outputs = engine.generate(record.prompts, params)
    for output, tokens, logprobs in zip(outputs, record.tokens, record.logprobs, strict=True):
        (choice,) = output.outputs
        assert choice.token_ids == tokens
        ours = [entry[token].logprob for entry, token in zip(choice.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(ours, logprobs, atol=golden.TOLERANCE, rtol=0)
