"""Every family against transformers' committed answers, through the loader and plain causal attention."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejax.models.loader import load_model
from tests.models import golden


@pytest.mark.parametrize("name", golden.names())
def test_tokens_and_logprobs_match_transformers(name, tmp_path):
    record = golden.load(name)
    model = load_model(golden.write_model(record, tmp_path), dtype="float32")
    tokens, logprobs = golden.teacher_forced(model, record)
    np.testing.assert_array_equal(tokens, record.tokens)
    np.testing.assert_allclose(logprobs, record.logprobs, rtol=0, atol=golden.TOLERANCE)
