import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_gguf.calib.allocate import DENSE, allocate, efficient_options, sparsest_within
from tca_gguf.errors import TcaError

GROUP = 64


@st.composite
def problem(draw, max_heads=8, max_configs=8):
    heads, configs = draw(st.integers(1, max_heads)), draw(st.integers(1, max_configs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = np.sort(rng.integers(1, GROUP, configs))
    cost = rng.random((heads, configs)) * np.where(rng.random((heads, 1)) < 0.3, 1e-3, 1.0)
    if draw(st.booleans()):
        cost = np.sort(cost, axis=1)[:, ::-1].copy()  # as in practice: more tokens, less error
    if draw(st.booleans()):
        cost = np.round(cost, 1)  # ties and zeros
    return cost, kept


def total(cost, kept, choice):
    size = sum(GROUP if c == DENSE else int(kept[c]) for c in choice)
    return sum(0.0 if c == DENSE else cost[h, c] for h, c in enumerate(choice)), size


@given(problem(), st.floats(0.02, 1.0))
def test_never_above_the_target(p, keep):
    cost, kept = p
    if kept.min() > keep * GROUP:
        with pytest.raises(TcaError, match="keep"):
            allocate(cost, kept, GROUP, keep)
        return
    result = allocate(cost, kept, GROUP, keep)
    value, size = total(cost, kept, result.choice)
    assert size == result.kept <= keep * GROUP * len(cost) + 1e-6
    assert value == pytest.approx(result.cost)


@given(problem(4, 4), st.floats(0.1, 1.0))
@settings(max_examples=60)
def test_is_the_optimum(p, keep):
    cost, kept = p
    if kept.min() > keep * GROUP:
        return
    every = itertools.product([DENSE, *range(len(kept))], repeat=len(cost))
    best = min(v for v, size in (total(cost, kept, c) for c in every) if size <= keep * GROUP * len(cost) + 1e-9)
    assert allocate(cost, kept, GROUP, keep).cost == pytest.approx(best, abs=1e-12)


@given(problem(), st.floats(0.05, 1.0), st.floats(0.0, 0.5))
def test_more_budget_never_costs_more(p, keep, more):
    cost, kept = p
    if kept.min() > keep * GROUP:
        return
    wide = allocate(cost, kept, GROUP, min(1.0, keep + more))
    assert wide.cost <= allocate(cost, kept, GROUP, keep).cost + 1e-12


@given(problem())
def test_the_same_twice_and_dense_at_one(p):
    cost, kept = p
    assert (allocate(cost, kept, GROUP, 1.0).choice == allocate(cost.copy(), kept.copy(), GROUP, 1.0).choice).all()
    assert allocate(cost, kept, GROUP, 1.0).cost == 0.0


def test_a_head_that_needs_more_gets_more():
    kept = np.array([8, 32])
    cost = np.array([[1.0, 0.1], [0.1, 0.05]])
    assert allocate(cost, kept, GROUP, 40 / (2 * GROUP)).choice.tolist() == [1, 0]


def test_ties_go_to_the_smaller_then_the_earlier():
    kept = np.array([8, 8, 16])
    assert allocate(np.full((2, 3), 0.5), kept, GROUP, 0.4).choice.tolist() == [0, 0]


def test_cap_on_the_error():
    kept, errors = np.array([8, 16, 32]), np.array([[0.5, 0.2, 0.1], [0.9, 0.8, 0.7]])
    result = allocate(errors, kept, GROUP, 1.0, errors=errors, max_error=0.3)
    assert (errors[0, result.choice[0]] <= 0.3 if result.choice[0] != DENSE else True) and result.choice[1] == DENSE
    with pytest.raises(TcaError, match="max_error"):
        allocate(errors, kept, GROUP, 0.3, errors=errors, max_error=0.3)
    assert sparsest_within(errors, kept, 0.3).tolist() == [1, DENSE]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_bad_target(keep):
    with pytest.raises(TcaError, match="keep"):
        allocate(np.ones((1, 1)), np.array([8]), GROUP, keep)


def test_errors_that_are_not_finite_are_refused():
    with pytest.raises(TcaError, match="finite"):
        allocate(np.array([[np.nan]]), np.array([8]), GROUP, 0.5)


def test_dominated_configurations_are_dropped():
    options = efficient_options(np.array([8, 16, 24]), np.array([0.5, 0.6, 0.1]), GROUP)
    assert options == [(8, 0.5, 0), (24, 0.1, 2), (GROUP, 0.0, DENSE)]
