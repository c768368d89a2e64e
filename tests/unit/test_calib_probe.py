"""The probe: its target against the definition, and that it finds the direction that attention follows."""

import numpy as np
import pytest
import reference_select

from tca_gguf.calib.probe import ProbeFit, ridge, unrotate
from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError
from tca_gguf.native import Rope

LAYOUT = Layout(block_size=4, group_size=16, window=12, sinks=4)
N, DK, DV, SCALE = 90, 8, 6, 0.35


def example(seed=0, n_head=4, n_head_kv=2):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_head, N, DK)).astype(np.float32)
    k, v = rng.standard_normal((n_head_kv, N, DK)).astype(np.float32), rng.standard_normal((n_head_kv, N, DV)).astype(np.float32)
    return q, k, v


QUERIES, KINDS = np.array([10, 33, 40, 50, 64, 77, 80, 89]), np.array([0, 0, 1, 0, 0, 1, 1, 1])


def added_by_definition(q, k, v, kind, head, softcap):
    """float64 [N]: sum over queries and query heads of p_j ||v_j - o|| / ||o||, where the query would see token j compacted."""
    total, n_rep = np.zeros(N), len(q) // len(k)
    for i in QUERIES[kind == KINDS]:
        for r in range(head * n_rep, (head + 1) * n_rep):
            s = k[head, : i + 1].astype(np.float64) @ q[r, i].astype(np.float64) * SCALE
            s = softcap * np.tanh(s / softcap) if softcap else s
            p = np.exp(s) / np.exp(s).sum()
            o = p @ v[head, : i + 1].astype(np.float64)
            for g in range(LAYOUT.compacted(int(i))):
                for j in range(LAYOUT.group(g).start, LAYOUT.group(g).stop):
                    total[j] += p[j] * np.linalg.norm(v[head, j] - o) / np.linalg.norm(o)
    return total


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("step", [N, 17])
def test_what_tokens_add_is_the_definition(step, softcap):
    q, k, v = example()
    fit = ProbeFit(LAYOUT, 2, 1, 2, N, QUERIES, KINDS)
    for start in range(0, N, step):
        end = min(N, start + step)
        mine = (QUERIES >= start) & (QUERIES < end)
        fit.add_layer(0, q[:, QUERIES[mine]], k[:, :end], v[:, :end], QUERIES[mine], KINDS[mine], SCALE, softcap)
    for kind in (0, 1):
        for head in (0, 1):
            np.testing.assert_allclose(fit.added[kind, 0, head], added_by_definition(q, k, v, kind, head, softcap), rtol=1e-4, atol=1e-6)


def test_groups_that_few_queries_see_are_left_out():
    many = np.arange(32, N)
    fit = ProbeFit(LAYOUT, 2, 1, 2, N, many, np.zeros(len(many), int))
    # 58 queries see the first group compacted, 42 the second; fewer than MIN_QUERIES the third and fourth
    assert fit.kinds == [0] and fit.seen[:, 0].tolist() == [58, 42, 26, 10] and fit.n_groups == 2
    with pytest.raises(TcaError, match="longer calibration text"):
        ProbeFit(LAYOUT, 2, 1, 2, N, np.array([5]), np.array([0])).solve_layer(0, np.zeros((2, N, DK)), None)


def test_it_finds_the_direction_that_attention_follows():
    """Queries all look along one direction before RoPE; keys and queries are rotated slowly, so distance changes little."""
    rng = np.random.default_rng(3)
    layout, n = Layout(16, 64, 48, 16), 700
    direction = rng.standard_normal(DK)
    freqs = (1e-6 * np.ones(DK // 2)).astype(np.float32)
    rope = Rope(2, DK, 1.0, freqs)
    k = rng.standard_normal((1, n, DK)).astype(np.float32)
    v = rng.standard_normal((1, n, DV)).astype(np.float32)
    q = (4 * direction / np.linalg.norm(direction) + 0.3 * rng.standard_normal((2, n, DK))).astype(np.float32)
    queries = np.arange(128, n, 3)
    fit = ProbeFit(layout, 2, 1, 1, n, queries, np.zeros(len(queries), int))
    fit.add_layer(0, q[:, queries], k, v, queries, np.zeros(len(queries), int), SCALE, 0.0)
    (probe,) = fit.solve_layer(0, k, rope)
    assert (fit.probe[0, 0] == probe).all()
    assert probe @ direction / np.linalg.norm(probe) / np.linalg.norm(direction) > 0.95


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_keys_before_the_rotation(kind):
    rng = np.random.default_rng(kind)
    keys, positions = rng.standard_normal((20, 10)).astype(np.float32), rng.integers(0, 9000, 20)
    rope = Rope(kind, 6, 1.25, np.array([1.0, 0.1, 0.01], np.float32))
    expected = reference_select.unrotate(keys, positions, ("none", "norm", "neox")[kind], 6, 1.25, rope.freqs)
    np.testing.assert_allclose(unrotate(keys, positions, rope), expected, atol=1e-12)
    assert (unrotate(keys, positions, None) == keys).all()


def test_ridge_regression_by_hand():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 3)) * [1.0, 100.0, 1e-3] + [5.0, 0.0, 1.0]
    x = np.concatenate([x, np.ones((5000, 1))], axis=1)  # a dimension that never changes
    weights = ridge(x, x @ [2.0, -0.5, 7.0, 3.0] + 4.0, strength=1e-9)
    np.testing.assert_allclose(weights, [2.0, -0.5, 7.0, 0.0], rtol=1e-5, atol=1e-9)
    shrunk = ridge(x[:, :1], 2 * x[:, 0], strength=1.0)  # one dimension: shrunk by 1/(1 + strength)
    np.testing.assert_allclose(shrunk, [1.0], rtol=1e-9)
