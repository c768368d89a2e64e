"""Models that mix sliding-window and full attention, on a small gemma3 with random weights: four layers, the second and the
fourth with full attention."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from runtime_context import F16, GROUP, Q8_0, SINKS, WINDOW, Context, LoadError, make_budgets, same_positions
from tca_gguf import gguf_file, kv, native
from tca_gguf.budgets import DENSE, SLIDING

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, N_EMBD, N_FF, N_VOCAB, N_SWA = 4, 4, 2, 64, 128, 256, 512, 40
N = 430
FULL = [1, 3]


def write_gemma3(path: Path) -> Path:
    """f32 weights, one large key a few tokens: attention that is not uniform."""
    rng = np.random.default_rng(3)
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(N_SWA)
    writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
    writer.add_vocab_size(N_VOCAB)
    writer.add_string("tokenizer.ggml.model", "no_vocab")

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 1 / np.sqrt(shape[-1]), shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", N_VOCAB, N_EMBD)
    add("output_norm", N_EMBD)
    for i in range(N_LAYER):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{i}.{name}", N_EMBD)
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.full(HEAD_DIM, 1.5, np.float32))
        add(f"blk.{i}.attn_q", N_HEAD * HEAD_DIM, N_EMBD)
        add(f"blk.{i}.attn_k", N_HEAD_KV * HEAD_DIM, N_EMBD)
        add(f"blk.{i}.attn_v", N_HEAD_KV * HEAD_DIM, N_EMBD)
        add(f"blk.{i}.attn_output", N_EMBD, N_HEAD * HEAD_DIM)
        add(f"blk.{i}.ffn_gate", N_FF, N_EMBD)
        add(f"blk.{i}.ffn_up", N_FF, N_EMBD)
        add(f"blk.{i}.ffn_down", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("iswa") / "gemma3.gguf")


def embed(stock: Path, name: str, full: list[list[int]]) -> Path:
    """Budgets of the full layers; the others slide."""
    heads = np.full((N_LAYER, N_HEAD_KV), SLIDING, np.int32)
    heads[FULL] = full
    path = stock.with_name(name)
    gguf_file.embed_budgets(stock, path, make_budgets(stock, head_config=heads))
    return path


@pytest.fixture(scope="module")
def tca(stock: Path) -> Path:
    return embed(stock, "tca.gguf", [[0, DENSE], [2, 1]])


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in np.random.default_rng(8).permutation(N_VOCAB)[:N]]


@pytest.fixture(scope="module")
def whole(tca: Path, ids: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    with Context(tca) as c:
        logits = c.feed(ids, every=29)
        return c.positions(), logits


def test_dense_budgets_are_the_stock_cache(stock: Path, ids: list[int]) -> None:
    dense = embed(stock, "dense.gguf", [[DENSE, DENSE], [DENSE, DENSE]])
    with Context(dense) as a, Context(stock) as b:
        x, y = a.feed(ids, every=29), b.feed(ids, every=29)
        assert np.abs(x - y).max() < 1e-3
        assert a.greedy([int(x[-1].argmax())], 8) == b.greedy([int(y[-1].argmax())], 8)


def test_only_full_layers_have_regions(tca: Path, ids: list[int], whole) -> None:
    budgets = gguf_file.read_budgets(tca)
    assert budgets is not None and budgets.stored_layers() == FULL
    positions, _ = whole
    for layer in range(N_LAYER):
        for head in range(N_HEAD_KV):
            p = positions[layer * N_HEAD_KV + head]
            assert len(p) == native.plan_length(budgets, layer, head, N) == (0 if layer not in FULL else len(p))
    assert len(positions[1 * N_HEAD_KV + 1]) == N > len(positions[1 * N_HEAD_KV])
    with Context(tca, n_ctx=4096, type_k=F16, type_v=F16) as c:
        info, predicted = c.info(), budgets.kv_bytes(HEAD_DIM, HEAD_DIM, 4096)
        assert (info.kv_bytes, info.kv_bytes_dense) == predicted
        assert predicted[1] == 4096 * len(FULL) * N_HEAD_KV * 2 * HEAD_DIM * 2
        assert native.model_shape(ctypes.cast(c.model, ctypes.c_void_p).value).stored == tuple(FULL)


@pytest.mark.parametrize(("n_ctx", "n_ubatch", "kv_type"), [(4096, 512, "f16"), (1024, 64, "q8_0"), (300, 512, "f16")])
def test_every_layer_counts_in_the_bytes(tca: Path, stock: Path, n_ctx: int, n_ubatch: int, kv_type: str) -> None:
    shape, budgets = gguf_file.read_model(tca)
    assert budgets is not None and shape.n_swa == N_SWA
    expected, kind = kv.predicted(shape, budgets, n_ctx, kv_type, n_ubatch), kv.KV_TYPES[kv_type]
    with Context(tca, n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kind, type_v=kind, flash=1) as c:
        assert kv.of_context(c.address) == expected
        share = f"{expected.allocated / 2**20:.2f} MiB instead of {expected.stock / 2**20:.2f} MiB dense"
        (line,) = [line for line in Context.lines if "ragged KV cache on" in line]
        assert share in line and "2 of 4 layers have budgets" in line
    with Context(stock, n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kind, type_v=kind, flash=1, swa_full=False) as c:
        assert kv.of_context(c.address) == kv.KvBytes(False, expected.stock, expected.stock)
    assert kv.stock(shape, FULL, n_ctx, kv_type, n_ubatch) == expected.stock


@pytest.mark.parametrize("n_ubatch", [1, 33, 100])
def test_micro_batches_do_not_matter(tca: Path, ids: list[int], whole, n_ubatch: int) -> None:
    positions, logits = whole
    with Context(tca, n_ubatch=n_ubatch) as c:
        got = c.feed(ids, every=29)
        assert same_positions(c.positions(), positions)
        assert np.abs(got - logits).max() < 1e-3


def test_what_is_dropped_changes_the_answer(stock: Path, ids: list[int], whole) -> None:
    with Context(stock) as c:
        dense = c.feed(ids, every=29)
    assert np.abs(dense[:4] - whole[1][:4]).max() < 1e-3 < 0.01 < np.abs(dense[-1] - whole[1][-1]).max()


def test_quantized_cache(tca: Path, stock: Path, ids: list[int]) -> None:
    with Context(tca, type_k=Q8_0, type_v=Q8_0) as c, Context(stock, type_k=Q8_0, type_v=Q8_0) as q8, Context(stock) as exact:
        got, dense, want = (context.feed(ids[:117], every=29) for context in (c, q8, exact))
        noise = np.abs(dense - want).max()
        assert np.abs(got - want).max() <= 2 * noise, noise  # before any group goes, as close as the stock cache of that type
        assert np.isfinite(c.feed(ids[117:])).all()


def test_a_tail_is_taken_back_as_far_as_both_caches_reach(tca: Path, ids: list[int], whole) -> None:
    positions, logits = whole
    with Context(tca, n_ubatch=64) as c:
        c.feed(ids)
        groups = c.sequence()[1]
        assert groups > 2
        assert not c.rm(0, SINKS + WINDOW + (groups - 1) * GROUP - 1, -1) and c.pos_max() == N - 1
        assert c.rm(0, N - 9, -1) and c.pos_max() == N - 10
        got = c.feed(ids[N - 9 :])
        assert same_positions(c.positions(), positions) and np.abs(got - logits[-1]).max() < 1e-3
        assert c.rm(0, -1, -1) and c.pos_max() == -1
        assert np.abs(c.feed(ids) - logits[-1]).max() < 1e-3


def test_a_window_that_is_gone_is_not_taken_back(stock: Path, ids: list[int]) -> None:
    """Long after the window of an early position was overwritten in the sliding layers, dense regions alone do not help."""
    dense = embed(stock, "dense.gguf", [[DENSE, DENSE], [DENSE, DENSE]])
    with Context(dense, n_ubatch=64) as c:  # 256 cells for 40 + 64 + 48 + 64 tokens
        c.feed(ids)
        assert not c.rm(0, 60, -1) and c.pos_max() == N - 1
        assert c.pos_min() > 60
        assert c.rm(0, N - 112, -1) and c.pos_max() == N - 113  # what a ragged cache could take back at most


def test_state_is_restored(tca: Path, ids: list[int]) -> None:
    with Context(tca) as a:
        a.feed(ids[:300])
        for seq in (None, 0):
            saved = a.save(seq)
            with Context(tca) as b:
                assert b.load(saved, seq) == len(saved)
                assert same_positions(a.positions(), b.positions())
                # not bit for bit: the stock sliding-window cache has its cells in another order after it was restored
                assert np.abs(a.feed(ids[300:]) - b.feed(ids[300:])).max() < 1e-3
                assert same_positions(a.positions(), b.positions())
                assert a.rm(0, 300, -1) or a.load(saved, seq) == len(saved)


def test_what_llama_server_takes_back_is_taken_back(tca: Path, ids: list[int]) -> None:
    """At every length: what the server's rule calls removable is, and after a restored state so is the last token that it removes.

    The rule (server-context.cpp of the pin): a tail from p on goes if pos_min < p - n_swa; a state saved with pos_min and pos_max
    is restored for p if pos_min < p - n_swa, and then everything from max(pos_min + 1, pos_max) on goes.
    """
    first = SINKS + WINDOW + 3 * GROUP
    with Context(tca, n_ubatch=64, swa_full=False) as a, Context(tca, n_ubatch=64, swa_full=False) as b:
        a.feed(ids[:first])
        edges = 0
        for n in range(first, first + GROUP + 2):
            state, pos_min, pos_max = a.save(0), a.pos_min(), a.pos_max()
            assert pos_max == n - 1
            edges += pos_min == pos_max
            assert b.load(state, 0) == len(state) and (b.pos_max(), b.sequence()) == (pos_max, a.sequence())
            after = max(pos_min + 1, pos_max)
            assert b.rm(0, after, -1) and b.pos_max() == after - 1, n
            for c in (a, b):
                assert c is a or c.load(state, 0)
                p = c.pos_min() + N_SWA + 1
                if p <= n:
                    assert c.rm(0, p, -1) and c.pos_max() == p - 1, (n, p)
                    c.feed(ids[p:n])
            a.feed(ids[n : n + 1])
        assert edges == 2  # right after a compaction


def test_the_last_token_of_a_restored_state(tca: Path, ids: list[int]) -> None:
    with Context(tca) as a, Context(tca) as b:
        a.feed(ids[:300])
        assert b.load(a.save(0), 0) and b.rm(0, 299, -1)
        got, want = b.feed(ids[299:]), a.feed(ids[300:])
        assert np.abs(got - want).max() < 1e-3 and same_positions(a.positions(), b.positions())
        assert b.load(a.save(0), 0) and not b.rm(0, N - N_SWA, -1)  # its window is not in the state


def test_partial_states_hold_both_parts(tca: Path, ids: list[int]) -> None:
    with Context(tca) as c, Context(tca) as fresh:
        c.feed(ids[:300])
        partial, whole = c.save(0, partial=True), c.save(0)
        c.feed(ids[300:])
        assert len(partial) < 0.7 * len(whole)
        assert c.load(partial, 0, partial=True) == len(partial) and c.pos_max() == 299
        fresh.feed(ids[:300])
        assert same_positions(c.positions(), fresh.positions())
        assert np.abs(c.feed(ids[300:]) - fresh.feed(ids[300:])).max() < 1e-3
        assert same_positions(c.positions(), fresh.positions())


def test_both_parts_hold_the_same_tokens(tca: Path, ids: list[int]) -> None:
    """seq_keep, a state of an empty sequence, a state that is refused half-way: what follows is as fresh."""
    with Context(tca, n_ctx=2048, n_seq_max=2) as c, Context(tca) as fresh:
        want = fresh.feed(ids)
        c.feed(ids[:200], seq=0)
        c.feed(ids[100:300], seq=1)
        c.C.llama_memory_seq_keep(c.memory, 1)
        assert c.pos_max(0) == -1 and np.abs(c.feed(ids) - want).max() < 1e-3
        c.rm(1, -1, -1)
        empty = c.save(1)
        assert c.load(empty, 0) == len(empty) and c.pos_max(0) == -1
        assert np.abs(c.feed(ids) - want).max() < 1e-3
        full = c.save(0)
        c.rm(0, -1, -1)
        c.feed(ids[:250])
        for cut in range(len(full) - 2000, len(full), 400):  # in the stock part
            assert c.load(full[:cut], 0) == 0 and c.pos_max() == 249
        fresh.rm(0, -1, -1)
        fresh.feed(ids[:250])
        assert np.abs(c.feed(ids[250:]) - fresh.feed(ids[250:])).max() < 1e-3


def test_sequences_side_by_side(tca: Path, ids: list[int], whole) -> None:
    _, logits = whole
    with Context(tca, n_ctx=2048, n_seq_max=2) as c:
        for at in range(0, N, 86):
            part = ids[at : at + 86]
            other = ids[at : at + 50]
            start = at // 86 * 50
            assert c.batch([(t, at + i, [0], i == len(part) - 1) for i, t in enumerate(part)] +
                           [(t, start + i, [1], False) for i, t in enumerate(other)]) == 0  # fmt: skip
        assert np.abs(c.logits(85) - logits[-1]).max() < 1e-3
        assert c.sequence(0)[0] == N and c.sequence(1)[0] == 250
        c.C.llama_memory_seq_cp(c.memory, 0, 1, -1, -1)
        assert np.abs(c.feed([7], 0) - c.feed([7], 1)).max() < 1e-4


@pytest.mark.parametrize(("layer", "words"), [(0, "has sliding-window attention, so it must be -2"), (1, "has full attention, so it must not be -2")])
def test_budgets_of_the_wrong_layers_are_refused(stock: Path, tmp_path: Path, layer: int, words: str) -> None:
    heads = np.full((N_LAYER, N_HEAD_KV), SLIDING, np.int32)
    heads[FULL] = 0
    heads[layer] = 0 if layer == 0 else SLIDING
    budgets = replace(make_budgets(stock), head_config=heads)
    gguf_file.embed_budgets(stock, tmp_path / "wrong.gguf", budgets)
    with pytest.raises(LoadError, match=words):
        Context(tmp_path / "wrong.gguf")
