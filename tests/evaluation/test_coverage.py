"""Filter layers: mass that lists of other layers hold, the greedy choice, the file beside the model, its readers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from benchmarks import random_model

from sparsejax import Engine, SamplingParams
from sparsejax.cli import main
from sparsejax.errors import ConfigError, ModelError
from sparsejax.evaluation.coverage import best_filters, coverage, covered, shared_mass
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model
from sparsejax.sparsity.calibration import FILE, read_filters, write_filters
from tests.engine.models import random_prompts, tiny_engine, tiny_model


def test_shared_mass_is_the_probability_in_the_lists():
    mass = np.zeros((2, 1, 2, 8))
    mass[0, 0, 0, [3, 7]] = 0.7, 0.3
    mass[0, 0, 1, [2, 0]] = 0.4, 0.6
    mass[1, 0, :, 2], mass[1, 0, :, 4] = 0.1, 0.9
    share = shared_mass(mass, 4)  # pages 0, 6, 7 are pinned; one more is chosen
    np.testing.assert_allclose(share, [[(1.0 + 0.6) / 2, 0.0], [(0.3 + 0.6) / 2, 0.9]])
    np.testing.assert_allclose(shared_mass(mass, 8), 1.0)


def test_coverage_of_everything_is_one_and_grows_with_the_share():
    model, texts = tiny_model(), random_prompts(3, (70, 90))
    found = [coverage(model, texts, share=share, page_size=8, queries=5) for share in (0.4, 0.7, 1.0)]
    np.testing.assert_allclose(found[2], 1.0, rtol=1e-5)
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all() and (found[0] > 0.2).all()
    with pytest.raises(ConfigError, match="a text has 4 tokens"):
        coverage(model, [[1, 2, 3, 4]], share=1.0, page_size=8, queries=5)


def test_filters_are_chosen_for_what_they_cover():
    share = np.eye(5) * 0.1 + 0.5
    share[0, 1] = share[2, 3:] = 0.9
    assert best_filters(share, 1) == (0,)
    assert best_filters(share, 2) == (0, 2)
    assert covered(share, (0, 2)) == pytest.approx((0.6 + 0.9 + 0.6 + 0.9 + 0.9) / 5)
    assert best_filters(share, 5) == (0, 1, 2, 3, 4)
    for wrong in (0, 6):
        with pytest.raises(ConfigError, match="has 5 layers, give 1 to 5"):
            best_filters(share, wrong)


@pytest.fixture
def model(tmp_path):
    return random_model.write(random_model.TINY, "float32", tmp_path)


def test_a_file_of_other_weights_or_layers_is_refused(model):
    loaded = load_model(model)
    assert read_filters(loaded) is None
    write_filters(model, loaded, (0, 1), note="kept")
    assert read_filters(loaded) == (0, 1)
    facts = json.loads((model / FILE).read_text())
    assert facts["note"] == "kept"
    for changed, message in (
        ({"base_model": "0"}, "other weights"),
        ({"filter_layers": [0, 2]}, "from 0 to 1"),
        ({"filter_layers": []}, "from 0 to 1"),
        ({"filter_layers": "auto"}, "from 0 to 1"),
    ):
        (model / FILE).write_text(json.dumps(facts | changed))
        with pytest.raises(ModelError, match=message):
            read_filters(loaded)


def test_an_engine_takes_what_was_measured_and_requests_do_too(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    loaded = load_model(tmp_path / "copy")
    write_filters(tmp_path / "copy", loaded, (0, 5))
    settings = dict(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=32, warmup="none")
    with Engine.from_loaded(loaded, sparsity=("omnikv", "quest"), **settings) as engine:
        policies = engine.core._policies
        assert policies.default.filter_layers == (0, 5)
        asked = policies.of(SamplingParams(sparsity={"preset": "omnikv", "budget": 32}), 20)
        assert (asked.filter_layers, asked.budget) == ((0, 5), 32)
        given = policies.of(SamplingParams(sparsity={"preset": "omnikv", "filter_layers": (0, 2)}), 20)
        assert given.filter_layers == (0, 2)
        later = policies.of(SamplingParams(sparsity="turbo"), 20)
        assert (later.filter_layers, later.codec) == ((2, 5), "dense"), "where its dense layers end, and after"
    with tiny_engine(sparsity="turbo", warmup="none") as engine:
        assert engine.core._policies.default.filter_layers == "auto"  # nothing was measured: spread over the depth


def test_the_model_in_the_package_has_its_filter_layers():
    model = load_model(None)
    assert read_filters(model)[0] == 0


def test_the_command_measures_prints_and_stores(capsys, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "copy", ignore=shutil.ignore_patterns(FILE))
    few = ["--model", str(tmp_path / "copy"), "--page-size", "16"]
    few += ["--lengths", "256", "--samples", "1", "--filters", "2"]
    assert main(["calibrate", *few, "--dry-run"]) == 0
    assert not (tmp_path / "copy" / FILE).exists()
    assert main(["calibrate", *few]) == 0
    text = capsys.readouterr().out
    layers = read_filters(load_model(tmp_path / "copy"))
    assert f"chosen: {layers}" in text and "without calibration: (0, 1, 3)" in text and len(layers) == 2
    (tmp_path / "text").write_text("too short")
    assert main(["calibrate", *few, "--text", str(tmp_path / "text")]) == 2
    assert "the text has only" in capsys.readouterr().err
