import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_select import importance

from tca_gguf.calib.configs import config_grid
from tca_gguf.calib.contribution import equal_heads
from tca_gguf.calib.evaluate import ErrorTable, head_errors
from tca_gguf.calib.stream import Layout, kept_tokens, order_group, visible

LAYOUT = Layout(block_size=4, group_size=16, window=12, sinks=4)
KEEP = (1, 2, 4)


def naive(q, queries, k, v, scale, softcap, layout, orders, keep_counts, counts, sinks=None):
    """Error and dropped mass over the visible sets, token by token in float64."""
    error, dropped = np.zeros(q.shape[:2]), np.zeros(q.shape[:2])
    kept = [kept_tokens(o, keep_counts, counts) for o in orders]
    for r in range(q.shape[0]):
        for i, query in enumerate(queries):
            s = k[: query + 1].astype(np.float64) @ q[r, i].astype(np.float64) * scale
            if softcap:
                s = softcap * np.tanh(s / softcap)
            top = s.max() if sinks is None else max(s.max(), sinks[r])
            p = np.exp(s - top)
            sink = 0.0 if sinks is None else np.exp(sinks[r] - top) / (p.sum() + np.exp(sinks[r] - top))
            p *= (1 - sink) / p.sum()
            o = p @ v[: query + 1].astype(np.float64)
            seen = visible(layout, int(query), kept)
            mass = p[seen].sum() + sink
            hat = p[seen] @ v[seen].astype(np.float64) / mass
            error[r, i] = np.linalg.norm(o - hat) / np.linalg.norm(o)
            dropped[r, i] = 1 - mass
    return error, dropped


def example(seed, n=90, n_rep=2, dk=8, dv=6, sharp=1.0):
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((n_rep, n, dk)) * sharp).astype(np.float32)
    k = rng.standard_normal((n, dk)).astype(np.float32)
    v = (rng.standard_normal((n, dv)) + 0.5).astype(np.float32)
    return q, k, v


def orders_of(k, layout, n_groups):
    return [order_group(importance(k[layout.group(g)].astype(np.float64)).astype(np.float32), layout.block_size)
            for g in range(n_groups)]  # fmt: skip


@given(seed=st.integers(0, 2**32 - 1), softcap=st.sampled_from([0.0, 2.0]), sharp=st.sampled_from([0.2, 1.0, 6.0]))
@settings(max_examples=25, deadline=None)
def test_equals_the_definition(seed, softcap, sharp):
    q, k, v = example(seed, sharp=sharp)
    queries = np.array([3, 31, 32, 47, 48, 63, 64, 80, 89])  # on both sides of the boundaries
    orders = orders_of(k, LAYOUT, LAYOUT.compacted(89))
    configs = config_grid(LAYOUT.n_blocks, KEEP)
    got = head_errors(q[:, queries], queries, k, v, 0.35, softcap, LAYOUT, orders, KEEP, configs, equal_heads(0, len(q), v.shape[1]))
    for c, counts in enumerate(configs):
        error, dropped = naive(q[:, queries], queries, k, v, 0.35, softcap, LAYOUT, orders, KEEP, counts)
        np.testing.assert_allclose(got.error[c], error, atol=2e-5, rtol=2e-4)
        np.testing.assert_allclose(got.dropped[c], dropped, atol=2e-6)
    assert got.error[:, :, :2].max() < 1e-6  # nothing is evicted yet


def test_attention_sinks():
    """A score without a value takes its share before and after selection, and the bound still holds."""
    q, k, v = example(11, sharp=2.0)
    queries = np.array([31, 48, 64, 89])
    orders = orders_of(k, LAYOUT, LAYOUT.compacted(89))
    configs, sinks = config_grid(LAYOUT.n_blocks, KEEP), np.array([-1.0, 2.5], np.float32)
    got = head_errors(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, KEEP, configs, equal_heads(0, len(q), v.shape[1]), sinks)
    for c, counts in enumerate(configs):
        error, dropped = naive(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, KEEP, counts, sinks)
        np.testing.assert_allclose(got.error[c], error, atol=2e-5, rtol=2e-4)
        np.testing.assert_allclose(got.dropped[c], dropped, atol=2e-6)
    assert (got.bound >= got.error * (1 - 1e-4) - 1e-5).all()


@pytest.mark.parametrize("keep", [(1, 2), (0, 4), (0, 1, 3), (0, 1, 2, 4)])
def test_other_keep_counts(keep):
    q, k, v = example(7)
    queries = np.array([40, 70, 89])
    orders = orders_of(k, LAYOUT, LAYOUT.compacted(89))
    configs = config_grid(LAYOUT.n_blocks, keep)
    got = head_errors(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, keep, configs, equal_heads(0, len(q), v.shape[1]))
    for c, counts in enumerate(configs):
        error, dropped = naive(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, keep, counts)
        np.testing.assert_allclose(got.error[c], error, atol=2e-5, rtol=2e-4)
        np.testing.assert_allclose(got.dropped[c], dropped, atol=2e-6)


@given(
    seed=st.integers(0, 2**32 - 1), sharp=st.sampled_from([0.2, 1.0, 6.0, 30.0]), shift=st.sampled_from([0.0, 3.0, 100.0]),
    outlier=st.integers(0, 89), size=st.sampled_from([1.0, 50.0]), dv=st.sampled_from([1, 6]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_error_never_exceeds_its_bound(seed, sharp, shift, outlier, size, dv):
    """The error of the definition, in float64, for every configuration, query and head; values with outliers and far means."""
    q, k, v = example(seed, dv=dv, sharp=sharp)
    v += np.float32(shift)
    v[outlier] *= np.float32(size)
    queries = np.array([31, 32, 48, 64, 89])
    orders = orders_of(k, LAYOUT, LAYOUT.compacted(89))
    configs = config_grid(LAYOUT.n_blocks, KEEP)[::5]
    got = head_errors(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, KEEP, configs, equal_heads(0, len(q), v.shape[1]))
    for c, counts in enumerate(configs):
        error, dropped = naive(q[:, queries], queries, k, v, 0.35, 0.0, LAYOUT, orders, KEEP, counts)
        # what float32 adds: the mass is known to 1e-6, and the error of an output near zero is large in relation to it
        slack = 1e-5 * (1 + got.bound[c] / np.maximum(dropped, 1e-5))
        assert (error <= got.bound[c] + slack).all(), (c, (error - got.bound[c]).max())
    assert got.bound[:, :, 0].max() == 0  # nothing is evicted yet


def test_the_bound_is_within_a_factor_of_two():
    """Opposite values, a third of the mass dropped: the error is 2/3 of a value's length, and the bound says no more than twice that."""
    n, target = 33, 4 + 15
    q, k, v = np.zeros((1, n, 8), np.float32), np.zeros((n, 8), np.float32), np.full((n, 1), 1.0, np.float32)
    q[0, 32, 0] = 1.0
    k[[0, 1, target], 0] = 60.0  # two sinks and the last token of the group share all attention
    v[target] = -1.0
    scores = np.ones(16, np.float32)
    scores[15] = 0
    got = head_errors(q[:, [32]], np.array([32]), k, v, 1.0, 0.0, LAYOUT, [order_group(scores, 4)], KEEP, np.array([[0, 4, 0]]), equal_heads(0, len(q), v.shape[1]))
    error, bound = got.error[0, 0, 0] / 3, got.bound[0, 0, 0] / 3  # ||o|| is 1/3
    assert got.dropped[0, 0, 0] == pytest.approx(1 / 3, abs=1e-5) and error == pytest.approx(2 / 3, abs=1e-5)
    assert error <= bound <= 2 * error


def test_what_the_layer_loses():
    """||W_h (o - o_hat)||^2 with W_h itself, from the outputs of the definition; the share is relative to all heads of the layer."""
    rng = np.random.default_rng(11)
    n, n_rep, dv, n_embd = 90, 2, 6, 40
    q = rng.standard_normal((2 * n_rep, n, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, n, 8)).astype(np.float32), rng.standard_normal((2, n, dv)).astype(np.float32)
    projection = rng.standard_normal((2 * n_rep, n_embd, dv)).astype(np.float32)
    grams = projection.transpose(0, 2, 1) @ projection
    queries, configs = np.array([50, 70, 89]), config_grid(LAYOUT.n_blocks, KEEP)
    t = ErrorTable(("prose",), LAYOUT, KEEP, configs, 1, 2, lambda layer, n_head, size: grams)
    rank = lambda head, group: order_group(importance(k[head, group].astype(np.float64)).astype(np.float32), 4)  # noqa: E731
    t.add_layer(0, q[:, queries], k, v, queries, np.zeros(3, int), 0.35, 0.0, rank)

    lost, added = np.zeros((2, len(configs))), 0.0
    for h in range(2):
        orders = orders_of(k[h], LAYOUT, LAYOUT.compacted(89))
        for r in range(n_rep):
            for i in queries:
                p = np.exp(k[h, : i + 1].astype(np.float64) @ q[h * n_rep + r, i] * 0.35)
                o = p @ v[h, : i + 1] / p.sum()
                added += np.sum((projection[h * n_rep + r] @ o) ** 2)
                for c, counts in enumerate(configs):
                    seen = visible(LAYOUT, int(i), [kept_tokens(order, KEEP, counts) for order in orders])
                    o_hat = p[seen] @ v[h, seen] / p[seen].sum()
                    lost[h, c] += np.sum((projection[h * n_rep + r] @ (o - o_hat)) ** 2)
    np.testing.assert_allclose(t.lost_share()[0, 0], lost / added, rtol=1e-4)


def test_a_lost_needle_is_an_error_of_one():
    # one key aligned with the query carries everything; the configuration that drops it loses all of the output
    q, k, v = example(1, n_rep=1)
    target = LAYOUT.group(1).start + 5
    k[target] = 30 * q[0, 89] / np.linalg.norm(q[0, 89])
    v[target] = -50
    orders = orders_of(k, LAYOUT, 3)
    scores = np.ones(16, np.float32)
    scores[5] = 0  # the least important token
    orders[1] = order_group(scores, 4)
    got = head_errors(q[:, [89]], np.array([89]), k, v, 1.0, 0.0, LAYOUT, orders, KEEP, np.array([[4, 0, 0], [0, 0, 4]]), equal_heads(0, len(q), v.shape[1]))
    assert got.error[0, 0, 0] > 0.9 and got.dropped[0, 0, 0] > 0.99
    assert got.error[1, 0, 0] < 1e-5


def table(layout=LAYOUT, n_layer=1, n_head_kv=2):
    return ErrorTable(("prose", "answer"), layout, KEEP, config_grid(layout.n_blocks, KEEP), n_layer, n_head_kv)


def run_table(q, k, v, queries, kinds, step):
    """Feeds the queries in parts, those of ``step`` tokens of text at a time, with no key behind them."""
    t, n = table(), q.shape[1]
    rank = lambda head, group: order_group(importance(k[head, group].astype(np.float64)).astype(np.float32), 4)  # noqa: E731
    for start in range(0, n, step):
        end = min(n, start + step)
        mine = (queries >= start) & (queries < end)
        t.add_layer(0, q[:, queries[mine]], k[:, :end], v[:, :end], queries[mine], kinds[mine], 0.35, 0.0, rank)
    return t


def test_parts_do_not_matter():
    rng = np.random.default_rng(3)
    q = rng.standard_normal((4, 90, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 90, 8)).astype(np.float32), rng.standard_normal((2, 90, 6)).astype(np.float32)
    queries, kinds = np.array([32, 40, 50, 64, 77, 89]), np.array([0, 1, 0, 0, 1, 1])
    whole, parts = run_table(q, k, v, queries, kinds, 90), run_table(q, k, v, queries, kinds, 17)
    assert whole.count.tolist() == parts.count.tolist() == [[3], [3]]
    np.testing.assert_allclose(whole.mean_error(), parts.mean_error(), atol=1e-6)
    np.testing.assert_allclose(whole.mean_dropped(), parts.mean_dropped(), atol=1e-6)
    # and the mean is the mean over queries and query heads
    orders = orders_of(k[1], LAYOUT, LAYOUT.compacted(89))
    error, _ = naive(q[2:4][:, [32, 50, 64]], [32, 50, 64], k[1], v[1], 0.35, 0.0, LAYOUT, orders, KEEP, whole.configs[2])
    assert whole.mean_error()[0, 0, 1, 2] == pytest.approx(error.mean(), abs=1e-5)


def test_no_queries_is_no_error():
    t = table()
    empty = np.zeros(0, np.int64)
    t.add_layer(0, np.zeros((4, 0, 8), np.float32), None, None, empty, empty, 1.0, 0.0, None)
    assert t.mean_error().max() == 0.0
