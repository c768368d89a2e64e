"""Compaction in a real model: which positions stay, whatever the micro-batch, and what the store costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_context import BF16, BLOCK, F16, F32, FIRST, GROUP, Q4_0, Q8_0, SINKS, WINDOW, Context, make_budgets, same_positions
from tca_gguf import gguf_file, native
from tca_gguf.budgets import Budgets
from tca_gguf.calib.runtime import Session

N = 430  # tokens: five groups are compacted, and the last of them mid-way through a micro-batch of any size


@pytest.fixture(scope="module")
def budgets(tca_model: Path) -> Budgets:
    found = gguf_file.read_budgets(tca_model)
    assert found is not None
    return found


def check_structure(c: Context, budgets: Budgets, n_tokens: int, seq: int = 0) -> None:
    """Every region: as long as the plan says, increasing, with all sinks, the whole dense part, and m tokens of each group."""
    groups = native.plan_groups(budgets, n_tokens)
    assert c.sequence(seq) == (n_tokens, groups)
    fixed = SINKS + groups * GROUP
    everything = c.positions(seq)
    for layer in range(budgets.n_layer):
        for head in range(budgets.n_head_kv):
            p = everything[layer * budgets.n_head_kv + head]
            assert len(p) == native.plan_length(budgets, layer, head, n_tokens) == native.region_length(c.address, layer, seq, head)
            assert len(p) <= native.plan_capacity(budgets, layer, head, c.info().n_ctx_seq)
            assert (np.diff(p) > 0).all() and p[0] == 0 and p[-1] == n_tokens - 1
            assert np.array_equal(p[:SINKS], np.arange(SINKS)[: len(p)])
            assert np.array_equal(p[p >= fixed], np.arange(fixed, n_tokens)) or groups == 0
            assert groups == 0 or n_tokens - fixed >= WINDOW
            config = int(budgets.head_config[layer, head])
            for group in range(groups):
                inside = p[(p >= SINKS + group * GROUP) & (p < SINKS + (group + 1) * GROUP)]
                assert len(inside) == native.kept_per_group(budgets, config)
                if config >= 0:  # as many blocks keep k tokens as the configuration says
                    per_block = np.bincount((inside - SINKS) // BLOCK - group * GROUP // BLOCK, minlength=GROUP // BLOCK)
                    want = np.repeat(budgets.keep_counts, budgets.configs[config])
                    assert np.array_equal(np.sort(per_block), np.sort(want))


@pytest.fixture(scope="module")
def whole(tca_model: Path, ids: list[int]) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    """Positions, logits and next greedy tokens with micro-batches of 512."""
    with Context(tca_model) as c:
        logits = c.feed(ids[:N], every=29)
        positions = c.positions()
        return positions, logits, c.greedy([int(logits[-1].argmax())], 8)


def test_structure_at_many_lengths(tca_model: Path, budgets: Budgets, ids: list[int]) -> None:
    with Context(tca_model) as c:
        n = 0
        for step in (1, 14, 2, 46, 64, 1, 1, 62, 1, 3, 130, 64, 41):  # 127, 128 and 191 among the sums, and runs over two groups
            c.feed(ids[n : n + step])
            n += step
            check_structure(c, budgets, n)
        assert c.pos_min() == SINKS + WINDOW + c.sequence()[1] * GROUP - 1 and c.pos_max() == n - 1


@pytest.mark.parametrize("n_ubatch", [1, 7, 64, 100])
def test_micro_batches_do_not_matter(tca_model: Path, budgets: Budgets, ids: list[int], whole, n_ubatch: int) -> None:
    positions, logits, tokens = whole
    with Context(tca_model, n_ubatch=n_ubatch, n_batch=max(n_ubatch, 101)) as c:
        got = c.feed(ids[:N], every=29)
        check_structure(c, budgets, N)
        assert same_positions(c.positions(), positions)
        assert got.shape == logits.shape
        worst = np.abs(got - logits).max()
        assert worst < 1e-3, worst
        assert c.greedy([int(got[-1].argmax())], 8) == tokens


def test_what_is_dropped_changes_the_answer(tca_model: Path, dense_model: Path, ids: list[int], whole) -> None:
    """The comparisons above would see a missing token."""
    with Context(dense_model) as c:
        logits = c.feed(ids[:N], every=29)
    assert np.abs(logits[:4] - whole[1][:4]).max() < 1e-3 < 0.05 < np.abs(logits[-1] - whole[1][-1]).max()


@pytest.mark.parametrize("metric", ["random", "streaming"])
def test_a_metric_knows_the_head_and_the_positions(metric: str, stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    """What these two keep does not depend on the keys, so it is known for every head of every layer."""
    budgets = make_budgets(stock_model, metric=metric)
    gguf_file.embed_budgets(stock_model, tmp_path / "model.gguf", budgets)
    with Context(tmp_path / "model.gguf", n_ubatch=100) as c:
        c.feed(ids[:N])
        check_structure(c, budgets, N)
        groups, everything = c.sequence()[1], c.positions()
    for (layer, head), config in np.ndenumerate(budgets.head_config):
        expected = [np.arange(SINKS), np.arange(SINKS + groups * GROUP, N)]
        for group in range(groups):
            positions = SINKS + group * GROUP + np.arange(GROUP)
            if config >= 0:
                kept, _ = native.select(np.zeros((GROUP, 1)), positions, None, BLOCK, budgets.keep_counts, budgets.configs[config],
                                        metric, "reference", layer=layer, head=head)  # fmt: skip
                positions = positions[kept]
            expected.append(positions)
        got = everything[layer * budgets.n_head_kv + head]
        np.testing.assert_array_equal(got, np.sort(np.concatenate(expected)), err_msg=f"layer {layer} head {head}")


@pytest.mark.parametrize("metric", ["observed-attn", "key-diff+observed"])
def test_the_last_queries_decide(metric: str, stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    """Until the first group goes every layer sees what it sees with the stock cache: its Q and K say which tokens must stay.

    A quantized cache holds keys, and gets queries, that were multiplied by Hadamard matrices: nearly the same tokens stay.
    """
    keep, n_ubatch = 4, 100  # tokens of every block; the last micro-batch has 28 queries
    captured: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}

    def on_layer(qkv: native.LayerQKV) -> None:
        captured[qkv.layer] = (qkv.q.astype(np.float64), qkv.k.astype(np.float64), qkv.scale)

    with Session(stock_model, 256, n_ubatch=n_ubatch, n_threads=1, capture=native.Capture(on_layer)) as session:
        for first in range(0, FIRST, n_ubatch):
            session.decode(np.array(ids[first : min(first + n_ubatch, FIRST)], np.int32))
        rope = native.context_rope(session.address, 0)

    budgets = make_budgets(stock_model, metric=metric, keep_counts=(keep,), configs=np.array([[GROUP // BLOCK]], np.int32))
    budgets.head_config[:] = 0
    gguf_file.embed_budgets(stock_model, tmp_path / "model.gguf", budgets)
    kept = {}
    for kv_type in (F16, Q8_0):
        with Context(tmp_path / "model.gguf", type_k=kv_type, type_v=kv_type, n_ubatch=n_ubatch) as c:
            c.feed(ids[:FIRST])
            assert c.sequence() == (FIRST, 1)
            kept[kv_type] = c.positions()

    same: dict[int, list[float]] = {F16: [], Q8_0: []}
    group = np.arange(SINKS, SINKS + GROUP)
    for (layer, head), _ in np.ndenumerate(budgets.head_config):
        q, k, scale = captured[layer]
        q = q.reshape(len(k), -1, *q.shape[1:])[head]  # [gqa, n, head_dim]
        assert q.shape[1] == FIRST - n_ubatch
        seen = np.arange(FIRST) <= n_ubatch + np.arange(q.shape[1])[:, None]
        scores = np.where(seen, scale * q @ k[head].T, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        importance = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(0, 1))[group]
        if metric == "key-diff+observed":
            by_key = native.select(k[head, group], group, rope, BLOCK, (keep,), (GROUP // BLOCK,), "key-diff")[1]
            importance = importance.argsort().argsort() + by_key.argsort().argsort()
        expected = [group[block + i] for block in range(0, GROUP, BLOCK)
                    for i in np.lexsort((np.arange(BLOCK), importance[block : block + BLOCK]))[-keep:]]  # fmt: skip
        for kv_type, positions in kept.items():
            found = positions[layer * budgets.n_head_kv + head]
            same[kv_type].append(len(np.intersect1d(found, expected)) / len(expected))
    assert np.mean(same[F16]) > 0.99 and np.mean(same[Q8_0]) > 0.9, (np.mean(same[F16]), np.mean(same[Q8_0]))


@pytest.mark.parametrize("types", [(F16, F16), (BF16, BF16), (Q8_0, Q8_0), (Q4_0, Q4_0), (F16, Q8_0)], ids=str)
def test_cache_types(tca_model: Path, stock_model: Path, budgets: Budgets, ids: list[int], whole, types: tuple[int, int]) -> None:
    with Context(tca_model, type_k=types[0], type_v=types[1], n_ubatch=100) as c:
        logits = c.feed(ids[:N], every=29)
        check_structure(c, budgets, N)
        assert np.isfinite(logits).all()
        # a coarser cache may keep other tokens; how far that may move the logits, the stock cache says before any group goes
        with Context(stock_model, type_k=types[0], type_v=types[1], flash=1) as stock, Context(stock_model) as exact:
            a, b = stock.feed(ids[:117], every=29), exact.feed(ids[:117], every=29)
        noise = np.abs(a - b).max()
        assert np.abs(logits[:5] - b).max() <= 2 * noise + 1e-3, (np.abs(logits[:5] - b).max(), noise)
        again = c.feed([5] * 30)  # and decode goes on
        assert np.isfinite(again).all()


@pytest.mark.parametrize("metric", ["key-diff", "key-probe"])
def test_the_first_layer_keeps_what_the_reference_selects(metric: str, stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    """Keys of the first layer do not depend on any attention: captured over the stock cache, they decide alone."""
    shape = gguf_file.model_shape(stock_model)
    probe = np.random.default_rng(2).standard_normal((shape.n_layer, shape.n_head_kv, shape.head_dim_k)).astype(np.float32)
    budgets = make_budgets(stock_model, metric=metric, probe=probe if metric == "key-probe" else None)
    gguf_file.embed_budgets(stock_model, tmp_path / "model.gguf", budgets)
    keys = []

    def capture(layer: native.LayerQKV) -> None:
        if layer.layer == 0:
            keys.append(layer.k.copy())

    captured = native.Capture(capture)
    C = Context(stock_model)  # opens the library, then a context of its own with the callback
    params = C.C.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.flash_attn_type, params.type_k, params.type_v = 512, 512, 512, 1, F32, F32
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = type(params.cb_eval)(captured.eval_ptr)
    params.cb_eval_user_data = captured.handle
    C.C.llama_free(C.ctx)
    C.ctx = C.C.llama_init_from_model(C.model, params)
    C.memory = C.C.llama_get_memory(C.ctx)
    with C:
        C.feed(ids[:N])
    assert captured.error is None and len(keys) == 1 and keys[0].shape[1] == N

    with Context(tmp_path / "model.gguf") as c:
        c.feed(ids[:N])
        rope = native.context_rope(c.address, 0)
        assert rope.type == 1 and rope.n_rot == 64 and rope.scale == pytest.approx(1.0)
        n_sparse = 0
        for head in range(budgets.n_head_kv):
            config = int(budgets.head_config[0, head])
            want = list(range(SINKS))
            groups = native.plan_groups(budgets, N)
            for group in range(groups):
                span = np.arange(SINKS + group * GROUP, SINKS + (group + 1) * GROUP)
                if config >= 0:
                    kept, _ = native.select(keys[0][head, span], span, rope, BLOCK, budgets.keep_counts, budgets.configs[config],
                                            metric, "reference", probe=probe[0, head])  # fmt: skip
                    span = span[kept]
                    n_sparse += 1
                want += span.tolist()
            want += range(SINKS + groups * GROUP, N)
            assert native.positions(c.address, 0, 0, head).tolist() == want
    assert n_sparse >= 5


@pytest.mark.parametrize("types", [(F16, F16), (Q8_0, Q4_0), (F32, BF16)], ids=str)
@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_bytes_are_those_of_the_plan(tca_model: Path, stock_model: Path, budgets: Budgets, types: tuple[int, int], n_seq_max: int) -> None:
    with Context(tca_model, n_ctx=3072, type_k=types[0], type_v=types[1], n_seq_max=n_seq_max, n_ubatch=64) as c:
        info = c.info()
        assert (info.n_layer, info.n_head_kv, info.n_stream, info.n_ctx_seq) == (budgets.n_layer, budgets.n_head_kv, n_seq_max, 3072 // n_seq_max)
        tca, dense = native.plan_bytes(budgets, 64, 64, *types, info.n_ctx_seq)
        assert (info.kv_bytes, info.kv_bytes_dense) == (tca * n_seq_max, dense * n_seq_max)
        assert info.kv_bytes < 0.75 * info.kv_bytes_dense
        assert (info.memory_bytes, info.memory_bytes_stock) == (info.kv_bytes, info.kv_bytes_dense)  # there are no other layers
        (line,) = [line for line in Context.lines if "ragged KV cache on" in line]
        sequences = "3 sequences of 1024 tokens each" if n_seq_max > 1 else "3072 tokens"
        assert f"{info.kv_bytes / 2**20:.2f} MiB instead of {info.kv_bytes_dense / 2**20:.2f} MiB dense" in line and sequences in line


def test_all_or_nothing(stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    """Heads that keep no token of a group, and heads that select but keep all of them."""
    for counts, kept in (((0, 16), 0), ((1, 16), GROUP)):
        path = tmp_path / f"{kept}.gguf"
        shape = gguf_file.model_shape(stock_model)
        heads = np.zeros((shape.n_layer, shape.n_head_kv), np.int32)
        configs = np.array([[GROUP // BLOCK, 0]] if kept == 0 else [[0, GROUP // BLOCK]], np.int32)
        b = make_budgets(stock_model, keep_counts=counts, configs=configs, head_config=heads)
        gguf_file.embed_budgets(stock_model, path, b)
        with Context(path, n_ubatch=90) as c:
            logits = c.feed(ids[:300])
            assert np.isfinite(logits).all()
            check_lengths = {len(p) for p in c.positions()}
            assert check_lengths == {300 - 3 * (GROUP - kept)} if kept == 0 else {300}
            if kept:
                with Context(stock_model) as stock:
                    assert np.abs(stock.feed(ids[:300]) - logits).max() < 1e-3
