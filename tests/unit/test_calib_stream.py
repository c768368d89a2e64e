import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_select import select

from tca_gguf.calib.stream import GroupOrder, Layout, blocks_at_least, kept_tokens, order_group, visible

KEEP = (1, 2, 4, 8, 16)


@st.composite
def counts_for(draw, n_blocks, n_keep):
    cuts = sorted(draw(st.lists(st.integers(0, n_blocks), min_size=n_keep - 1, max_size=n_keep - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, n_blocks], strict=True)]


@given(st.data(), st.integers(0, 2**32 - 1), st.booleans())
def test_order_gives_the_same_tokens_as_the_reference(data, seed, ties):
    rng = np.random.default_rng(seed)
    n_blocks = data.draw(st.integers(1, 12))
    counts = data.draw(counts_for(n_blocks, len(KEEP)))
    # integers make ties, in tokens and in sums of blocks
    scores = rng.integers(0, 3, n_blocks * 16) if ties else rng.random(n_blocks * 16)
    order = order_group(scores.astype(np.float32), 16)
    assert kept_tokens(order, KEEP, counts).tolist() == select(scores.astype(np.float32), 16, KEEP, counts)


def test_equal_scores_keep_the_newer():
    order = order_group(np.zeros(48, np.float32), 16)
    assert order.blocks.tolist() == [2, 1, 0]
    assert kept_tokens(order, KEEP, [2, 0, 0, 0, 1]).tolist() == [15, 31, *range(32, 48)]


def test_blocks_at_least():
    assert blocks_at_least(np.array([[3, 0, 2, 1, 4]])).tolist() == [[10, 7, 7, 5, 4]]


@given(
    blocks=st.integers(1, 4), block=st.sampled_from([4, 16]), window=st.integers(0, 40), sinks=st.integers(0, 9), query=st.integers(0, 400)
)
def test_visible_set(blocks, block, window, sinks, query):
    layout = Layout(block, blocks * block, window, sinks)
    n = layout.compacted(query)
    # the rule as the contract states it
    assert n == sum(query >= sinks + window + (g + 1) * layout.group_size for g in range(1000))
    kept = [np.array([0, layout.group_size - 1]) if layout.group_size > 1 else np.array([0]) for _ in range(n)]
    seen = visible(layout, query, kept)
    assert (np.diff(seen) > 0).all() and seen[-1] == query  # increasing, itself included, nothing twice
    assert set(range(min(sinks, query + 1))) <= set(seen.tolist())
    assert set(range(max(0, query - window), query + 1)) <= set(seen.tolist())  # the window is dense
    assert len(seen) == query + 1 - n * layout.group_size + sum(len(k) for k in kept)


def test_default_boundaries():
    layout = Layout()
    assert layout.first_evicting == 1024
    assert [layout.compacted(i) for i in (1023, 1024, 1535, 1536)] == [0, 1, 1, 2]


@pytest.mark.parametrize("query", [1023, 1024])
def test_default_visible_at_the_first_boundary(query):
    seen = visible(Layout(), query, [np.arange(0, 512, 16)])
    assert len(seen) == (1024 if query == 1023 else 1025 - 512 + 32)


def test_group_order_is_plain_data():
    order = GroupOrder(blocks=np.array([0]), tokens=np.array([[3, 2, 1, 0]]))
    assert kept_tokens(order, (1, 2, 4), (0, 1, 0)).tolist() == [2, 3]
