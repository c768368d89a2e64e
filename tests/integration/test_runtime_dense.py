"""Where nothing is dropped the runtime is the stock one: off, every head dense, or a short context."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime_context import F16, F32, FIRST, Context, make_budgets
from tca_gguf import gguf_file, models


@pytest.fixture(scope="module")
def embedded(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole SmolLM2 as quantized, every head dense."""
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    gguf_file.embed_budgets(smollm2, path, make_budgets(smollm2, dense=True))
    return path


def test_off_is_off(smollm2: Path, embedded: Path, ids: list[int]) -> None:
    with Context(smollm2, type_k=F16, type_v=F16) as stock:
        want = stock.feed(ids[:200], every=1)
        assert not stock.info().active
    with Context(embedded, type_k=F16, type_v=F16, enabled=False) as off:
        assert not off.info().active and off.info().kv_bytes == 0
        got = off.feed(ids[:200], every=1)
    assert np.array_equal(want, got)  # bit by bit


def test_off_in_the_file_and_forced_on(stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    path = tmp_path / "off.gguf"
    gguf_file.embed_budgets(stock_model, path, replace(make_budgets(stock_model), enabled=False))
    with Context(stock_model) as stock, Context(path) as off:
        assert not off.info().active
        assert np.array_equal(stock.feed(ids[:150]), off.feed(ids[:150]))
    with Context(path, enabled=True) as forced:
        assert forced.info().active


def test_dense_budgets_against_stock(stock_model: Path, dense_model: Path, ids: list[int]) -> None:
    with Context(stock_model) as stock, Context(dense_model) as dense:
        assert dense.info().active
        a, b = stock.feed(ids[:400], every=7), dense.feed(ids[:400], every=7)
        assert np.isfinite(b).all()
        worst = np.abs(a - b).max()
        assert worst < 1e-3, f"largest difference {worst}"
        assert dense.sequence() == (400, 0) and dense.pos_min() == 0
        tokens = [model.greedy([int(a[-1].argmax())], 32) for model in (stock, dense)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("n_ubatch", [1, 13, 512])
def test_a_short_context_against_stock(stock_model: Path, tca_model: Path, ids: list[int], n_ubatch: int) -> None:
    n = FIRST - 1  # one more and a group goes
    with Context(stock_model) as stock, Context(tca_model, n_ubatch=n_ubatch) as tca:
        a, b = stock.feed(ids[:n], every=5), tca.feed(ids[:n], every=5)
        assert np.abs(a - b).max() < 1e-3
        assert tca.sequence() == (n, 0)
        assert all(np.array_equal(p, np.arange(n)) for p in tca.positions())
        tca.feed(ids[n : n + 1])
        assert tca.sequence() == (n + 1, 1) and min(map(len, tca.positions())) < n


def test_quantized_weights_differ_no_more_than_stock_does_from_itself(smollm2: Path, embedded: Path, ids: list[int]) -> None:
    """Products with quantized weights amplify rounding: stock with flash attention on and off is the measure."""
    logits = []
    for path, flash in ((smollm2, 0), (smollm2, 1), (embedded, 0)):
        with Context(path, type_k=F16, type_v=F16, flash=flash) as c:
            logits.append(c.feed(ids[:160], every=1))
    off, on, tca = logits
    noise, ours = np.abs(off - on), np.minimum(np.abs(tca - off), np.abs(tca - on))
    assert ours.mean() <= 1.5 * noise.mean() and ours.max() <= 2 * noise.max(), (ours.mean(), noise.mean(), ours.max(), noise.max())
    same = [(x.argmax(1) == y.argmax(1)).mean() for x, y in ((off, on), (tca, off))]
    assert same[1] >= same[0] - 0.05, same


QWEN = Path(os.environ.get("TCA_TEST_QWEN", models.cache_dir() / models.MODELS["qwen2.5-coder-0.5b"].file))


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.is_file(), reason="no Qwen2.5-Coder-0.5B: set TCA_TEST_QWEN to its GGUF file")
def test_qwen(tmp_path: Path, ids: list[int]) -> None:
    """Biased projections, NEOX rotation, 14 heads on 2 KV heads."""
    path = tmp_path / "qwen.gguf"
    gguf_file.embed_budgets(QWEN, path, make_budgets(QWEN))
    n = FIRST - 1
    logits = []
    for source, flash in ((QWEN, 0), (QWEN, 1), (path, 0)):
        with Context(source, type_k=F32, type_v=F32, flash=flash) as c:
            logits.append(c.feed(ids[:n], every=3))
            if source == path:
                c.feed(ids[n:300])
                assert c.sequence() == (300, (300 - 64) // 64)
    off, on, tca = logits
    noise, ours = np.abs(off - on), np.minimum(np.abs(tca - off), np.abs(tca - on))
    assert ours.mean() <= 1.5 * noise.mean() and ours.max() <= 2 * noise.max(), (ours.mean(), noise.mean(), ours.max(), noise.max())
