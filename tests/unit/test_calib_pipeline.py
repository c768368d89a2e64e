"""The steps of calibration put together, over a made-up model in place of the runtime."""

import re
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from reference_select import importance

from tca_gguf.budgets import SLIDING
from tca_gguf.calib import pipeline
from tca_gguf.calib.capture import run_capture
from tca_gguf.calib.configs import calibrated_keep_counts, config_grid, kept_per_group
from tca_gguf.calib.evaluate import ErrorTable
from tca_gguf.calib.pipeline import COSTS, Measurement, choose_budgets, measure
from tca_gguf.calib.probe import ProbeFit
from tca_gguf.calib.stream import Layout, order_group
from tca_gguf.calib.texts import KINDS, CalibrationText
from tca_gguf.errors import TcaError

LAYOUT = Layout(block_size=4, group_size=16, window=12, sinks=4)
KEEP = calibrated_keep_counts(4)
N_LAYER, N_HEAD, N_HEAD_KV, DIM = 3, 4, 2, 8
SLIDING_LAYERS = ()


def measurement(seed=0, kinds=KINDS, full=tuple(range(5))):
    """Errors that fall with the kept tokens, at a level of their own for every head and kind."""
    rng = np.random.default_rng(seed)
    configs = config_grid(LAYOUT.n_blocks, KEEP)
    falling = 1 - kept_per_group(configs, KEEP) / LAYOUT.group_size
    level = rng.random((len(kinds), 5, 2, 1)) ** 3
    error = level * falling * (1 + 0.1 * rng.random((len(kinds), 5, 2, len(configs))))
    return Measurement(LAYOUT, KEEP, configs, "key-diff", 0, kinds, error, error / 2, error * 3, error, 100, "00" * 32, full)


@pytest.mark.parametrize("keep", [0.3, 0.39, 0.6, 1.0])
def test_budgets_meet_the_target(keep):
    budgets = choose_budgets(measurement(), keep)
    fractions = budgets.head_kept_fraction()
    assert fractions.mean() == pytest.approx(budgets.kept_fraction) and keep - 0.05 < fractions.mean() <= keep + 1e-9
    assert (budgets.configs.sum(axis=1) == LAYOUT.n_blocks).all()
    assert budgets.head_config.max() < len(budgets.configs) and budgets.head_config.min() >= -1
    used = set(budgets.head_config.ravel().tolist()) - {-1}
    assert used == set(range(len(budgets.configs)))  # no row that nobody uses
    assert budgets.calibration.errors.shape == (5, 2) and (budgets.calibration.errors[budgets.head_config == -1] == 0).all()


def test_budgets_are_better_than_uniform():
    m = measurement()
    budgets = choose_budgets(m, 0.4)
    affordable = np.flatnonzero(kept_per_group(m.configs, KEEP) <= 0.4 * LAYOUT.group_size)
    assert budgets.calibration.errors.mean() < m.head_error()[:, :, affordable].mean(axis=(0, 1)).min()


@pytest.mark.parametrize(("cost", "field"), [("head", "error"), ("layer", "lost")])
def test_kinds_count_alike_whatever_their_level(cost, field):
    m = measurement()
    scaled = Measurement(**{**m.__dict__, field: getattr(m, field) * np.array([1.0, 50.0])[:, None, None, None]})
    assert (choose_budgets(m, 0.4, cost=cost).head_config == choose_budgets(scaled, 0.4, cost=cost).head_config).all()


def test_a_cost_that_was_not_measured_is_refused():
    m = Measurement(**{**measurement().__dict__, "lost": None})
    assert choose_budgets(m, 0.4, cost="head").kept_fraction > 0.3
    with pytest.raises(TcaError, match="'layer'"):
        choose_budgets(m, 0.4)


@pytest.mark.parametrize("metric", ["observed-attn", "key-diff+observed"])
def test_a_metric_that_looks_at_queries_is_refused_before_anything_is_read(metric):
    with pytest.raises(TcaError, match=f"{re.escape(metric)} looks at the queries of a running model, so there is nothing to calibrate"):
        measure("no-such-model.gguf", metric=metric)


def test_each_cost_is_minimised():
    m = measurement()
    other = Measurement(**{**m.__dict__, "lost": measurement(1).error})
    for cost, values in (("head", other.error), ("layer", other.lost)):
        chosen = {c: choose_budgets(other, 0.4, cost=c) for c in COSTS}
        spent = {c: summed(values, other, budgets) for c, budgets in chosen.items()}
        assert spent[cost] == min(spent.values()) < max(spent.values())


def summed(values, m, budgets):
    """Of the chosen configurations, the kinds on one scale as allocation sees them; dense heads cost nothing."""
    combined = Measurement(**{**m.__dict__, "error": values}).combined("head")
    rows = {tuple(row): i for i, row in enumerate(m.configs.tolist())}
    return sum(0 if c < 0 else combined[index][rows[tuple(budgets.configs[c].tolist())]] for index, c in np.ndenumerate(budgets.head_config))


def test_a_kind_without_queries_is_left_out():
    m = measurement()
    only = np.array([1.0, 0.0])[:, None, None, None]
    silent = Measurement(**{**m.__dict__, "error": m.error * only, "lost": m.lost * only})
    assert (silent.head_error() == m.error[0]).all()
    np.testing.assert_allclose(silent.combined("head"), m.error[0])
    np.testing.assert_allclose(silent.combined("layer"), m.lost[0])


def test_max_error_caps_every_head():
    m = measurement()
    both = choose_budgets(m, 0.9, max_error=0.05)
    assert both.calibration.errors.max() <= 0.05 and both.calibration.target == 0.9
    alone = choose_budgets(m, max_error=0.05)
    assert alone.calibration.errors.max() <= 0.05
    # nothing sparser would do: the next smaller configuration of every head is above the cap
    kept = kept_per_group(m.configs, KEEP) / LAYOUT.group_size
    for index, fraction in np.ndenumerate(alone.head_kept_fraction()):
        sparser = m.head_error()[index][kept < fraction - 1e-9]
        assert (sparser > 0.05).all()
    assert alone.kept_fraction == pytest.approx(alone.head_kept_fraction().mean()) == pytest.approx(alone.calibration.target)
    assert choose_budgets(m, max_error=0.5).kept_fraction < alone.kept_fraction
    with pytest.raises(TcaError, match="max_error"):
        choose_budgets(m, 0.3, max_error=0.001)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(TcaError, match="above 0"):
            choose_budgets(m, max_error=bad)


def test_bounds_belong_to_the_chosen_configurations():
    budgets = choose_budgets(measurement(), 0.4)
    np.testing.assert_allclose(budgets.calibration.bounds, 3 * budgets.calibration.errors, rtol=1e-6)


class FakeSession:
    """Hands random attention inputs of a whole text to the capture, micro-batch by micro-batch."""

    n_batch = 20
    address = 1
    shape = property(lambda self: SimpleNamespace(stored=tuple(layer for layer in range(N_LAYER) if layer not in SLIDING_LAYERS)))

    def __init__(self, capture, n_kv_error=0, skip_layer=-1):
        self.capture, self.n_kv_error, self.skip_layer, self.n = capture, n_kv_error, skip_layer, 0
        rng = np.random.default_rng(5)
        self.q = rng.standard_normal((N_LAYER, N_HEAD, 400, DIM)).astype(np.float32)
        self.k, self.v = rng.standard_normal((2, N_LAYER, N_HEAD_KV, 400, DIM)).astype(np.float32)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def decode(self, tokens):
        first, self.n = self.n, self.n + len(tokens)
        for layer in range(N_LAYER):
            if layer == self.skip_layer:
                continue
            qkv = SimpleNamespace(layer=layer, n_tokens=len(tokens), n_kv=self.n + self.n_kv_error, scale=0.35, softcap=0.0, sinks=None,
                                  q=self.q[layer, :, first : self.n], k=self.k[layer, :, : self.n], v=self.v[layer, :, : self.n])  # fmt: skip
            try:
                self.capture.callback(qkv)
            except BaseException as error:  # as native.Capture does; llama_decode then ends the pass and calls it a success
                self.capture.error = error
                return


def scores_of(keys, probe):
    return importance(keys.astype(np.float64)).astype(np.float32) if probe is None else keys @ probe


@pytest.fixture
def fake_native(monkeypatch):
    native = types.ModuleType("tca_gguf.native")
    native.Capture = lambda fn: SimpleNamespace(callback=fn, error=None)
    native.context_rope = lambda address, layer: None
    native.needs_queries = lambda metric: False
    native.select = lambda keys, positions, rope, *_, probe=None, **__: (None, scores_of(keys, probe))
    import tca_gguf

    monkeypatch.setitem(sys.modules, "tca_gguf.native", native)
    monkeypatch.setattr(tca_gguf, "native", native, raising=False)
    return native


TEXT = CalibrationText("", np.zeros(75, np.int32), np.array([33, 47, 48, 60, 74]), np.array([0, 1, 0, 0, 1], np.int32), "")


def new_table():
    return ErrorTable(KINDS, LAYOUT, KEEP, config_grid(LAYOUT.n_blocks, KEEP), N_LAYER, N_HEAD_KV)


def test_capture_visits_every_layer_and_reports_progress(fake_native):
    table, seen = new_table(), []
    run_capture(FakeSession, table, TEXT, "key-diff", lambda *args: seen.append(args))
    assert table.count.tolist() == [[3] * N_LAYER, [2] * N_LAYER]
    assert [s[0] for s in seen] == list(range(1, N_LAYER * 4 + 1)) and {s[1] for s in seen} == {N_LAYER * 4}
    again = new_table()
    run_capture(FakeSession, again, TEXT, "key-diff")
    assert (again.mean_error() == table.mean_error()).all() and table.mean_error().min() >= 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no room"), TcaError("bad")])
def test_what_fails_in_the_callback_is_what_comes_out(fake_native, error):
    def fail(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        run_capture(FakeSession, new_table(), TEXT, "key-diff", fail)
    assert caught.value is error


def test_layers_that_slide_get_no_budget(fake_native, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SLIDING_LAYERS", (1,))
    table, seen = new_table(), []
    assert run_capture(FakeSession, table, TEXT, "key-diff", lambda *args: seen.append(args)) == [0, 2]
    assert table.count.tolist() == [[3, 0, 3], [2, 0, 2]] and seen[-1][:2] == (8, 8)

    m = measurement(full=(1, 4))
    for budgets in (choose_budgets(m, 0.4), choose_budgets(m, max_error=0.05)):
        assert budgets.stored_layers() == [1, 4] and (budgets.head_config[[0, 2, 3]] == SLIDING).all()
        assert np.isnan(budgets.head_kept_fraction()[[0, 2, 3]]).all()
        assert np.nanmean(budgets.head_kept_fraction()) == pytest.approx(budgets.kept_fraction)
        assert (budgets.calibration.errors[[0, 2, 3]] == 0).all()


def probe_fit():
    return ProbeFit(LAYOUT, len(KINDS), N_LAYER, N_HEAD_KV, len(TEXT.tokens), FIT_QUERIES, FIT_KINDS)


FIT_QUERIES = np.arange(33, 75)
FIT_KINDS = np.arange(42) % 2


def test_errors_are_those_of_the_probe_that_the_same_pass_fits(fake_native):
    table, fit, seen = new_table(), probe_fit(), []
    run_capture(FakeSession, table, TEXT, "key-probe", lambda *args: seen.append(args), fit)
    assert fit.probe.shape == (N_LAYER, N_HEAD_KV, DIM) and fit.probe.dtype == np.float32 and np.abs(fit.probe).max(axis=2).min() > 0
    assert seen[-1][:2] == (N_LAYER * 4, N_LAYER * 4)  # one pass

    expected, again, n = new_table(), probe_fit(), len(TEXT.tokens)
    session = FakeSession(None)
    for layer in range(N_LAYER):
        q, k, v = session.q[layer], session.k[layer, :, :n], session.v[layer, :, :n]
        again.add_layer(layer, q[:, FIT_QUERIES], k, v, FIT_QUERIES, FIT_KINDS, 0.35, 0.0)
        probe = again.solve_layer(layer, k, None)
        order = lambda head, group, k=k, probe=probe: order_group(k[head, group] @ probe[head], LAYOUT.block_size)  # noqa: E731
        expected.add_layer(layer, q[:, TEXT.queries], k, v, TEXT.queries, TEXT.kinds, 0.35, 0.0, order)
    np.testing.assert_allclose(fit.probe, again.probe, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(table.mean_error(), expected.mean_error(), atol=1e-5)
    other = new_table()
    run_capture(FakeSession, other, TEXT, "key-diff")
    assert np.abs(table.mean_error() - other.mean_error()).max() > 0.01  # another metric would be seen


def test_layers_that_slide_have_no_probe(fake_native, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SLIDING_LAYERS", (1,))
    fit = probe_fit()
    run_capture(FakeSession, new_table(), TEXT, "key-probe", fit=fit)
    assert (np.abs(fit.probe).max(axis=(1, 2)) > 0).tolist() == [True, False, True]


class FakeModel:
    """A token a word."""

    n_ctx_train, n_layer, n_head_kv, path = 400, N_LAYER, N_HEAD_KV, "m.gguf"

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def tokenize(self, text, first=False):
        return list(range(len(text.split())))


@pytest.mark.parametrize(("options", "metric", "keep_counts"), [
    ({}, "key-probe", (0, 1, 2, 4)),
    ({"metric": "key-diff"}, "key-diff", (0, 1, 2, 4)),
    ({"metric": "key-diff", "keep_counts": (1, 4)}, "key-diff", (1, 4)),
    ({"layout": Layout(block_size=8, group_size=16, window=12, sinks=4)}, "key-probe", (0, 1, 2, 4, 8)),
])  # fmt: skip
def test_what_is_measured_by_default(fake_native, monkeypatch, options, metric, keep_counts):
    monkeypatch.setattr(pipeline, "Model", FakeModel)
    monkeypatch.setattr(pipeline, "Session", lambda *_, capture, **__: FakeSession(capture))
    m = measure("m.gguf", cost="head", **{"layout": LAYOUT, **options})
    assert (m.metric, m.keep_counts, m.probe is not None) == (metric, keep_counts, metric == "key-probe")
    assert m.configs.shape[1] == len(keep_counts) and m.error.max() > 0
    budgets = choose_budgets(m, cost="head")
    assert (budgets.metric, budgets.keep_counts, budgets.probe is m.probe) == (metric, keep_counts, True)
    assert pipeline.DEFAULT_KEEP - 0.1 < budgets.kept_fraction <= pipeline.DEFAULT_KEEP and budgets.calibration.target == pipeline.DEFAULT_KEEP


def test_errors_in_the_callback_come_back_as_they_are(fake_native):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_capture(FakeSession, new_table(), TEXT, "key-diff", stop)


def test_unexpected_attention_is_refused(fake_native):
    with pytest.raises(TcaError, match="not supported"):
        run_capture(lambda fn: FakeSession(fn, n_kv_error=1), new_table(), TEXT, "key-diff")
    with pytest.raises(TcaError, match="were captured"):
        run_capture(lambda fn: FakeSession(fn, skip_layer=1), new_table(), TEXT, "key-diff")

