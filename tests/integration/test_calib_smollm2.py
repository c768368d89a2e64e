"""Calibration on a real model: SmolLM2-135M-Instruct."""

import random

import numpy as np
import pytest

from tca_gguf import gguf_file, llama, logs, models, native
from tca_gguf.calib import calibrate, choose_budgets, measure
from tca_gguf.calib.runtime import Session
from tca_gguf.calib.stream import Layout, order_group, visible
from tca_gguf.calib.stream import kept_tokens as kept_of
from tca_gguf.errors import TcaError
from tca_gguf.eval import Settings, run
from tca_gguf.eval.texts import plain_tokens, records

pytestmark = pytest.mark.slow
TOKENS = 2048


@pytest.fixture(scope="module")
def model():
    try:
        path = models.fetch("smollm2", models.cache_dir())
    except TcaError as error:
        pytest.skip(str(error))
    logs.take_over(llama.load().llama_cpp)
    return path


@pytest.fixture(scope="module")
def measured(model):
    return measure(model, tokens=TOKENS)


@pytest.fixture(scope="module")
def embedded(model, measured, tmp_path_factory):
    path = tmp_path_factory.mktemp("calib") / "smollm2.gguf"
    gguf_file.embed_budgets(model, path, choose_budgets(measured, 0.39))
    return path


def test_measured_errors_are_sane(measured):
    assert measured.error.shape == (2, 30, 3, len(measured.configs))
    assert np.isfinite(measured.error).all() and measured.error.min() >= 0
    assert (measured.dropped >= 0).all() and (measured.dropped <= 1).all()
    # more tokens, less error: on average over heads, from end to end of the family
    mean = measured.error.mean(axis=(0, 1, 2))
    assert mean[0] > 3 * mean[-1]


@pytest.mark.parametrize("keep", [0.15, 0.25, 0.39, 0.6])
def test_budgets_meet_the_target(measured, keep):
    budgets = choose_budgets(measured, keep)
    budgets.check()
    fractions = budgets.head_kept_fraction()
    assert keep - 0.002 < fractions.mean() <= keep
    assert fractions.max() > 2 * fractions.min()  # heads differ; this is what calibration is for


def test_the_same_run_twice_gives_the_same_budgets(model, measured):
    again, first = calibrate(model, tokens=TOKENS, keep=0.39), choose_budgets(measured, 0.39)
    assert (again.head_config == first.head_config).all() and (again.configs == first.configs).all()
    assert (again.calibration.errors == first.calibration.errors).all() and (again.probe == first.probe).all()
    assert again.calibration.text_sha256 == first.calibration.text_sha256


def test_the_runtime_keeps_what_calibration_evaluated(model, embedded, measured):
    """Layer 0's keys do not depend on eviction: its slots must be the visible set of the last token."""
    budgets = gguf_file.read_budgets(embedded)
    layout = Layout()
    keys, sizes = {}, []

    def on_layer(qkv):
        if qkv.layer == 0:
            sizes.append((qkv.n_tokens, qkv.n_kv))
            keys[0] = qkv.k.copy()

    capture = native.Capture(on_layer)
    with Session(model, 2048, n_ubatch=600, overrides={"tca.enabled": False}, capture=capture) as session:
        tokens = plain_tokens(session.tokenize, 1600, records(), random.Random(1))
        rope = native.context_rope(session.address, 0)
        session.decode(tokens)
    assert sizes == [(600, 600), (600, 1200), (400, 1600)]  # the cache's padding is not handed over
    with Session(embedded, 2048, n_ubatch=100) as session:  # micro-batches that do not match the groups
        session.decode(tokens)
        assert native.context_sequence(session.address, 0) == (1600, 2)
        for head in range(3):
            row = int(budgets.head_config[0, head])
            kept = []
            for g in range(2):
                span = layout.group(g)
                positions = np.arange(span.start, span.stop, dtype=np.int32)
                counts = budgets.configs[row] if row >= 0 else np.array([0, 0, 0, 0, 0, 32], np.int32)
                _, scores = native.select(np.ascontiguousarray(keys[0][head, span]), positions, rope, 16, budgets.keep_counts, counts,
                                          budgets.metric, probe=budgets.probe[0, head])  # fmt: skip
                kept.append(kept_of(order_group(scores, 16), budgets.keep_counts, counts))
            # a query at index 1600 would see groups compacted after 1600 tokens
            expected = visible(layout, 1600, kept)[:-1]
            assert native.positions(session.address, 0, 0, head).tolist() == expected.tolist()


def test_calibrated_budgets_keep_what_the_model_answers(embedded):
    """Two groups are compacted before eight facts in them are asked for. Budgets of another seed, or at 0.37, change no answer
    either, while uniform budgets lose three: one answer is room enough for another CPU's rounding."""
    result = run(embedded, Settings(("needle",), (2048,), ("calibrated", "key-diff"), samples=8, text="records"))
    calibrated, uniform = result.rows
    assert (calibrated["policy"], calibrated["answers"]) == ("calibrated", 8) and calibrated["evicted_tokens"] > 600
    assert calibrated["dense_correct"] >= 7 and calibrated["kept_correct"] >= calibrated["dense_correct"] - 1
    assert calibrated["kept_correct"] > uniform["kept_correct"] and calibrated["kv_bytes"] <= 1.01 * uniform["kv_bytes"]
    said = [[a["text"] for a in result.answers if a["policy"] == policy] for policy in ("dense", "calibrated")]
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 7


def test_a_text_that_evicts_nothing_is_refused(model, tmp_path):
    with pytest.raises(TcaError, match="too few"):
        calibrate(model, tokens=512)
    with pytest.raises(TcaError, match="no such file|does not exist"):
        calibrate(tmp_path / "none.gguf")
