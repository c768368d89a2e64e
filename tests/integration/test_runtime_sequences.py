"""Several sequences side by side, and what llama.cpp's memory calls do to compacted ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime_context import F16, F32, FIRST, GROUP, Q8_0, SINKS, WINDOW, Context, make_budgets, same_positions
from tca_gguf import gguf_file

LENGTHS = (333, 150, 260, 97)
STARTS = (0, 60, 120, 180)  # where in the shared text each sequence begins


def prompt(ids: list[int], i: int) -> list[int]:
    return (ids + ids)[STARTS[i] : STARTS[i] + LENGTHS[i]]


@pytest.fixture
def ctx(tca_model: Path) -> Iterator[Context]:
    with Context(tca_model, n_ctx=2048, n_seq_max=4) as c:
        yield c


@pytest.fixture(scope="module")
def alone(tca_model: Path, ids: list[int]) -> list[tuple[list[int], list[np.ndarray]]]:
    """Greedy tokens and positions of each sequence in a context of its own."""
    result = []
    for i in range(4):
        with Context(tca_model) as c:
            tokens = c.greedy(prompt(ids, i), 10)
            result.append((tokens, c.positions()))
    return result


@pytest.mark.parametrize("n_seqs", [2, 4])
@pytest.mark.parametrize("kv_unified", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_side_by_side_as_alone(tca_model: Path, ids: list[int], alone, n_seqs: int, kv_unified: bool, together: bool) -> None:
    with Context(tca_model, n_ctx=4 * 512, n_seq_max=4, kv_unified=kv_unified) as c:
        assert c.info().n_stream == 4 and c.info().n_ctx_seq == (2048 if kv_unified else 512)
        tokens: list[list[int]] = [[] for _ in range(n_seqs)]
        if together:  # all prompts in one batch, tokens of the sequences mixed
            entries = sorted((p, i) for i in range(n_seqs) for p in range(LENGTHS[i]))
            batch = [(prompt(ids, i)[p], p, [i], p == LENGTHS[i] - 1) for p, i in entries]
            assert c.batch(batch) == 0
            for row, (p, i) in enumerate(entries):
                if p == LENGTHS[i] - 1:
                    tokens[i].append(int(c.logits(row).argmax()))
        else:
            for i in range(n_seqs):
                tokens[i].append(int(c.feed(prompt(ids, i), i).argmax()))
        for step in range(9):  # decode in one batch, the sequences in turning order
            order = [(i + step) % n_seqs for i in range(n_seqs)]
            assert c.batch([(tokens[i][-1], LENGTHS[i] + step, [i], True) for i in order]) == 0
            for row, i in enumerate(order):
                tokens[i].append(int(c.logits(row).argmax()))
        for i in range(n_seqs):
            assert tokens[i] == alone[i][0]
            assert same_positions(c.positions(i), alone[i][1])
            assert c.sequence(i) == (LENGTHS[i] + 9, max(0, (LENGTHS[i] + 9 - SINKS - WINDOW) // GROUP))
        for i in range(n_seqs, 4):
            assert c.sequence(i) == (0, 0) and c.pos_max(i) == -1


# ---- seq_rm ------------------------------------------------------------------------------------------------------------


EDGE = SINKS + WINDOW + 3 * GROUP  # of the third group: with one token less it is not compacted


@pytest.mark.parametrize(("n", "cut"), [(100, 60), (100, 1), (FIRST - 1, FIRST - 2), (300, 260), (EDGE + 40, EDGE), (EDGE, EDGE), (EDGE + 1, EDGE)])
def test_a_tail_is_removed_as_if_it_never_was(ctx: Context, tca_model: Path, ids: list[int], n: int, cut: int) -> None:
    ctx.feed(ids[:n])
    assert ctx.rm(0, cut, -1)
    assert ctx.sequence() == (cut, max(0, (cut - SINKS - WINDOW) // GROUP)) and ctx.pos_max() == cut - 1 >= ctx.pos_min()
    got = ctx.feed(ids[350:430])
    with Context(tca_model) as fresh:
        fresh.feed(ids[:cut])
        want = fresh.feed(ids[350:430])
        assert same_positions(ctx.positions(), fresh.positions())
    assert np.abs(got - want).max() < 1e-3 and got.argmax() == want.argmax()


@pytest.mark.parametrize(("n", "cut"), [(EDGE, EDGE - 1), (EDGE + 20, EDGE - 1), (EDGE + 20, EDGE - GROUP), (FIRST, 1), (FIRST + 5, FIRST - 30),
                                        (EDGE + GROUP - 1, EDGE - GROUP + 40)])  # fmt: skip
@pytest.mark.parametrize("types", [(F32, F32), (F16, Q8_0)], ids=str)
def test_a_tail_over_a_compaction_is_taken_back(tca_model: Path, ids: list[int], n: int, cut: int, types: tuple[int, int]) -> None:
    """The rows that the compaction dropped were set aside. One token a micro-batch, so that a fresh run gives the same bits."""
    settings = dict(n_ubatch=1, n_batch=64, n_ctx=512, type_k=types[0], type_v=types[1])
    with Context(tca_model, **settings) as c, Context(tca_model, **settings) as fresh:
        c.feed(ids[:n])
        assert c.rm(0, cut, -1) and c.pos_max() == cut - 1
        fresh.feed(ids[:cut])
        assert c.sequence() == fresh.sequence() == (cut, max(0, (cut - SINKS - WINDOW) // GROUP)) and c.pos_min() == fresh.pos_min()
        assert same_positions(c.positions(), fresh.positions())
        assert c.save(0) == fresh.save(0)  # every row, bit by bit
        assert np.array_equal(c.feed(ids[350:355]), fresh.feed(ids[350:355]))


@pytest.mark.parametrize("n", [EDGE, EDGE + 20, FIRST + GROUP])
def test_a_tail_over_two_compactions_stays(ctx: Context, tca_model: Path, ids: list[int], n: int) -> None:
    """Lower counters over a compacted group would be a sequence that no evaluation of the remaining tokens leaves."""
    ctx.feed(ids[:n])
    before, groups = ctx.positions(), (n - SINKS - WINDOW) // GROUP
    edge = SINKS + WINDOW + groups * GROUP
    assert ctx.sequence() == (n, groups) and ctx.pos_min() == edge - 1
    for p0 in (1, SINKS, edge - GROUP - WINDOW, edge - GROUP - 1):
        assert not ctx.rm(0, p0, -1)
        assert ctx.sequence() == (n, groups) and same_positions(ctx.positions(), before)
    got = ctx.feed(ids[n : n + 90])  # and nothing of it is felt later
    with Context(tca_model) as fresh:
        fresh.feed(ids[:n])
        assert np.array_equal(got, fresh.feed(ids[n : n + 90]))


def test_every_removal_is_refused_or_leaves_a_fresh_sequence(ctx: Context, ids: list[int]) -> None:
    """Short contexts are not touched: what was compacted for a longer text is never left behind for a shorter one."""
    n = EDGE + 30
    for cut in range(1, n, 7):
        ctx.rm(0, -1, -1)
        ctx.feed(ids[:n])
        if ctx.rm(0, cut, -1):
            assert ctx.sequence() == (cut, max(0, (cut - SINKS - WINDOW) // GROUP)) and cut >= EDGE - GROUP
        else:
            assert ctx.sequence() == (n, 3) and cut < EDGE - GROUP


@pytest.mark.parametrize("rollback", [0, 10, GROUP])
def test_rollback_is_what_a_full_context_can_take_back(stock_model: Path, tmp_path: Path, ids: list[int], rollback: int) -> None:
    """tca.rollback slots more a region are enough where no slot is free; with none, not even one token goes over the compaction."""
    gguf_file.embed_budgets(stock_model, tmp_path / "model.gguf", make_budgets(stock_model, rollback=rollback))
    read = gguf_file.read_budgets(tmp_path / "model.gguf")
    assert read is not None and read.rollback == rollback
    edge = SINKS + WINDOW + 7 * GROUP  # 512, and the context ends 63 tokens later
    with Context(tmp_path / "model.gguf", n_ctx=512, n_ubatch=100) as c:
        assert c.C.llama_n_rs_seq(c.ctx) == rollback
        for n in (edge - GROUP + 10, edge - GROUP + 40, edge):
            c.rm(0, -1, -1)
            c.feed(ids[:n] if n <= len(ids) else [*ids, *ids][:n])
            groups = c.sequence()[1]
            last = SINKS + WINDOW + groups * GROUP
            for back in sorted({1, rollback, rollback + 1, n - last + 1}):
                if 0 < back <= rollback:
                    assert c.rm(0, n - back, -1), (n, back)
                    c.feed([*ids, *ids][n - back : n])


def test_all_that_a_compaction_leaves_out_is_refused_without_rollback(stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    gguf_file.embed_budgets(stock_model, tmp_path / "model.gguf", make_budgets(stock_model, rollback=0))
    with Context(tmp_path / "model.gguf", n_ctx=512) as c:
        c.feed([*ids, *ids][:512])  # the last group went with the last token, and the regions are full
        assert c.sequence() == (512, 7)
        assert c.rm(0, 511, -1)  # what was dropped lies in the slots that it left
        c.feed(ids[:1])
        assert c.sequence() == (512, 7)


def test_what_cannot_be_removed_stays(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    ctx.feed(ids[:300])  # compacted at 256, and before that at 192
    ctx.feed(ids[:50], seq=1)
    before = ctx.positions(), ctx.sequence(), ctx.pos_min(), ctx.pos_max()
    for p0, p1 in ((0, 10), (0, 299), (10, 20), (20, -1), (100, 300), (191, -1), (250, 260), (299, 299 + 0), (-1, 5), (1, 10_000)):
        removed = ctx.rm(0, p0, p1)
        assert removed is (p0 == p1)  # an empty range is removed at once
        after = ctx.positions(), ctx.sequence(), ctx.pos_min(), ctx.pos_max()
        assert same_positions(before[0], after[0]) and before[1:] == after[1:]
    assert ctx.rm(-1, 30, -1) is False  # all sequences: sequence 1 could, sequence 0 cannot, so neither does
    assert ctx.sequence(1) == (50, 0)
    assert ctx.rm(0, 300, -1) and ctx.rm(0, 5000, 6000) and ctx.rm(3, 0, -1)  # nothing is there
    got = ctx.feed(ids[300:330])
    with Context(tca_model) as fresh:
        fresh.feed(ids[:300])
        assert np.abs(got - fresh.feed(ids[300:330])).max() < 1e-3


@pytest.mark.parametrize("ends", [(0, -1), (-1, -1), (0, 300), (0, 10**9)])
def test_a_whole_sequence_goes(ctx: Context, tca_model: Path, ids: list[int], ends: tuple[int, int]) -> None:
    ctx.feed(ids[:300])
    ctx.feed(ids[:200], seq=2)
    kept = ctx.positions(2)
    assert ctx.rm(0, *ends)
    assert ctx.sequence() == (0, 0) and ctx.pos_min() == -1 == ctx.pos_max()
    assert same_positions(ctx.positions(2), kept)
    got = ctx.feed(ids[100:300])  # the room is used again
    with Context(tca_model) as fresh:
        assert np.abs(got - fresh.feed(ids[100:300])).max() < 1e-3


def test_clear(ctx: Context, ids: list[int]) -> None:
    for data in (False, True):
        first = ctx.feed(ids[:200])
        ctx.feed(ids[:10], seq=3)
        ctx.C.llama_memory_clear(ctx.memory, data)
        assert ctx.sequence() == (0, 0) and ctx.pos_max() == -1 == ctx.pos_max(3)
        assert np.array_equal(first, ctx.feed(ids[:200]))
        ctx.C.llama_memory_clear(ctx.memory, True)


# ---- seq_cp, seq_keep, seq_add -----------------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    ctx.C.llama_memory_seq_cp(ctx.memory, 0, 2, -1, -1)
    assert ctx.sequence(2) == ctx.sequence(0) and ctx.pos_max(2) == 299
    assert same_positions(ctx.positions(2), ctx.positions(0))
    ctx.C.llama_memory_seq_cp(ctx.memory, 2, 3, 0, -1)  # a copy of a copy, and the first source goes on before it is made
    got = ctx.feed(ids[300:400]), ctx.feed(ids[400:470], seq=2)
    assert ctx.rm(0, 0, -1)
    got = *got, ctx.feed(ids[300:400], seq=3)
    with Context(tca_model) as fresh:
        fresh.feed(ids[:300])
        state = fresh.save(0)
        want = [fresh.feed(ids[300:400])]
        fresh.rm(0, 0, -1)
        assert fresh.load(state, 0)
        want += [fresh.feed(ids[400:470]), want[0]]
        assert same_positions(ctx.positions(2), fresh.positions())
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < 1e-3


def test_copies_of_a_part(ctx: Context, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    ctx.C.llama_memory_seq_cp(ctx.memory, 0, 1, 0, 280)  # the cut lies in the dense part
    assert ctx.sequence(1) == (280, 3)
    assert all(np.array_equal(a, b[: len(a)]) for a, b in zip(ctx.positions(1), ctx.positions(0), strict=True))
    for p0, p1 in ((0, 100), (0, 255), (50, -1), (290, -1)):
        ctx.feed(ids[:20], seq=2)
        ctx.C.llama_memory_seq_cp(ctx.memory, 0, 2, p0, p1)  # cannot be done: no half sequence is left that looks like one
        assert ctx.sequence(2) == (0, 0) and ctx.pos_max(2) == -1
    assert "seq_cp" in "".join(Context.lines)
    ctx.C.llama_memory_seq_cp(ctx.memory, 3, 1, -1, -1)  # a copy of nothing
    assert ctx.sequence(1) == (0, 0)
    ctx.C.llama_memory_seq_cp(ctx.memory, 0, 0, -1, -1)
    assert ctx.sequence(0) == (300, 3)


def test_keep(ctx: Context, ids: list[int]) -> None:
    for seq in range(4):
        ctx.feed(ids[: 50 * (seq + 3)], seq)
    before = ctx.positions(2)
    ctx.C.llama_memory_seq_keep(ctx.memory, 2)
    assert [ctx.sequence(seq)[0] for seq in range(4)] == [0, 0, 250, 0]
    assert same_positions(ctx.positions(2), before)


def test_positions_cannot_be_shifted(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    assert not ctx.C.llama_memory_can_shift(ctx.memory)
    ctx.feed(ids[:300])
    before = ctx.positions()
    Context.lines.clear()
    ctx.C.llama_memory_seq_add(ctx.memory, 0, 200, -1, -50)
    ctx.C.llama_memory_seq_div(ctx.memory, 0, 0, -1, 2)
    assert "seq_add" in "".join(Context.lines) and "seq_div" in "".join(Context.lines)
    assert ctx.sequence() == (300, 3) and ctx.pos_max() == 299 and same_positions(ctx.positions(), before)
    got = ctx.feed(ids[300:330])
    with Context(tca_model) as fresh:
        fresh.feed(ids[:300])
        assert np.abs(got - fresh.feed(ids[300:330])).max() < 1e-3


# ---- batches that must be refused --------------------------------------------------------------------------------------


def test_a_full_context(tca_model: Path, ids: list[int]) -> None:
    with Context(tca_model, n_ctx=256, n_ubatch=64) as c:
        assert c.info().n_ctx_seq == 256
        c.feed(ids[:250])
        before = c.positions()
        assert c.batch([(5, 250 + i, [0], True) for i in range(7)]) == 1  # as the stock cache answers
        assert c.sequence() == (250, 2) and same_positions(c.positions(), before)
        c.feed(ids[250:256])
        assert c.batch([(5, 256, [0], True)]) == 1
        assert c.sequence()[0] == 256
        assert not c.rm(0, 190, -1) and c.rm(0, 240, -1)
        assert np.isfinite(c.feed(ids[:16])).all()
        assert c.rm(0, -1, -1) and np.isfinite(c.feed(ids[:256])).all()


def test_a_token_of_several_sequences(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    """It is appended to each, as hellaswag and beams want it; their own tokens follow in one batch."""
    ctx.feed(ids[:20])
    entries = [(t, i, [1, 3], i == 139) for i, t in enumerate(ids[:140])]
    entries += [(t, 140 + i, [1], i == 69) for i, t in enumerate(ids[200:270])] + [(t, 140 + i, [3], i == 39) for i, t in enumerate(ids[300:340])]
    assert ctx.batch(entries) == 0
    got = ctx.logits(139), ctx.logits(209), ctx.logits(249)
    assert [ctx.sequence(seq)[0] for seq in range(4)] == [20, 210, 0, 180]
    for seq, own, logits in ((1, ids[200:270], got[1]), (3, ids[300:340], got[2])):
        with Context(tca_model) as alone:
            assert np.abs(alone.feed(ids[:140]) - got[0]).max() < 1e-3
            assert np.abs(alone.feed(own) - logits).max() < 1e-3
            assert same_positions(alone.positions(), ctx.positions(seq))
            assert np.abs(alone.feed(ids[:30]) - ctx.feed(ids[:30], seq)).max() < 1e-3
    assert ctx.batch([(5, 20, [0, 1], True)]) != 0  # sequences of different lengths
    assert [ctx.sequence(seq)[0] for seq in range(4)] == [20, 240, 0, 210]


# ---- sequences that share one context ----------------------------------------------------------------------------------


def test_any_sequence_may_use_the_whole_context(tca_model: Path, ids: list[int]) -> None:
    text = [int(t) for t in np.random.default_rng(9).permutation(np.arange(500, 40000))[:1400]]  # no two alike, as in ids
    with Context(tca_model, n_ctx=1536, n_seq_max=4, kv_unified=True) as c, Context(tca_model, n_ctx=1536) as alone:
        c.feed(ids[:40], seq=2)  # a small one is in the way, and moves
        want, got = alone.feed(text), c.feed(text, seq=1)
        assert np.abs(got - want).max() < 1e-3 and same_positions(c.positions(1), alone.positions())
        assert len(text) + 40 <= 1536 and c.info().n_ctx_seq == 1536
        assert c.rm(1, -1, -1)
        got = c.feed(text, seq=3)  # the room is used again
        assert np.abs(got - want).max() < 1e-3
        with Context(tca_model, n_ctx=1536) as other:
            other.feed(ids[:40])
            assert same_positions(c.positions(2), other.positions()) and np.abs(c.feed(ids[50:60], 2) - other.feed(ids[50:60])).max() < 1e-3


def test_sequences_that_grow_together_are_as_alone(tca_model: Path, ids: list[int], alone) -> None:
    """Rooms change size again and again while all of them are in use; 840 tokens, dense two thirds of them."""
    with Context(tca_model, n_ctx=1024, n_seq_max=4, kv_unified=True) as c:
        done = [0] * 4
        rng = np.random.default_rng(5)
        while min(d - n for d, n in zip(done, LENGTHS, strict=True)) < 0:
            i = int(rng.integers(4))
            n = min(int(rng.integers(1, 60)), LENGTHS[i] - done[i])
            if n > 0:
                last = c.feed(prompt(ids, i)[done[i] : done[i] + n], i)
                done[i] += n
                if done[i] == LENGTHS[i]:
                    assert int(last.argmax()) == alone[i][0][0]
        for i in range(4):
            tokens = c.greedy(alone[i][0][:1], 9, i)
            assert tokens == alone[i][0][1:] and same_positions(c.positions(i), alone[i][1])


def test_a_shared_context_that_is_full(tca_model: Path, ids: list[int]) -> None:
    text = [*ids, *ids][:900]
    with Context(tca_model, n_ctx=1024, n_seq_max=3, kv_unified=True) as c:
        assert c.info().active
        c.feed(text)
        c.feed(ids[:90], seq=1)
        before = c.positions(0), c.positions(1)
        assert c.batch([(t, i, [2], False) for i, t in enumerate(text)]) == 1  # as the stock cache answers
        assert same_positions(c.positions(0), before[0]) and same_positions(c.positions(1), before[1]) and c.pos_max(2) == -1
        Context.lines.clear()
        c.C.llama_memory_seq_cp(c.memory, 0, 2, -1, -1)
        assert c.pos_max(2) == -1 and "the context is full" in "".join(Context.lines)
        state = c.save(0)
        assert c.load(state, 2) == 0 and c.pos_max(2) == -1
        assert c.rm(0, -1, -1) and c.load(state, 2) == len(state)
        assert same_positions(c.positions(2), before[0]) and same_positions(c.positions(1), before[1])


def test_contexts_that_the_ragged_cache_does_not_serve(tca_model: Path, ids: list[int]) -> None:
    """They get the stock cache, and the log says why: hundreds of sequences, embeddings."""
    for settings, words in ((dict(n_ctx=2048, n_seq_max=256, kv_unified=True), "2048 tokens for 256 sequences"), (dict(embeddings=True), "embeddings")):
        with Context(tca_model, **settings) as c:
            assert not c.info().active and c.C.llama_n_ctx(c.ctx) == (2048 if "n_ctx" in settings else 1024)
            lines = [line for line in Context.lines if line.startswith("tca:")]
            assert len(lines) == 1 and "stock KV cache" in lines[0] and words in lines[0]
            assert c.batch([(t, i, [0], i == 19) for i, t in enumerate(ids[:20])]) == 0


def test_a_copy_into_a_shared_context(tca_model: Path, ids: list[int]) -> None:
    with Context(tca_model, n_ctx=1024, n_seq_max=3, kv_unified=True) as c, Context(tca_model) as alone:
        c.feed(ids[:330])
        for seq in (1, 2):
            c.C.llama_memory_seq_cp(c.memory, 0, seq, -1, -1)
        assert c.rm(0, -1, -1)  # before the copies were made
        alone.feed(ids[:330])
        for seq in (1, 2):
            assert same_positions(c.positions(seq), alone.positions())
        state = alone.save(0)
        assert np.abs(c.feed(ids[330:400], 1) - alone.feed(ids[330:400])).max() < 1e-3
        assert alone.load(state, 0) and np.abs(c.feed(ids[400:470], 2) - alone.feed(ids[400:470])).max() < 1e-3


# ---- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[20, 20], [20, 22], [21], [19], [5]])
def test_positions_that_do_not_follow(ctx: Context, ids: list[int], positions: list[int]) -> None:
    """The store numbers its tokens by counting: a batch that counts otherwise must not get in."""
    ctx.feed(ids[:20])
    assert ctx.batch([(5, p, [0], True) for p in positions]) != 0
    assert ctx.sequence() == (20, 0) and np.array_equal(ctx.positions()[0], np.arange(20))


def test_a_sequence_may_start_anywhere(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    """RoPE is relative: the same tokens at other positions give the same answer, compacted or not."""
    want = ctx.feed(ids[:200])
    assert ctx.batch([(t, 1000 + i, [1], i == 199) for i, t in enumerate(ids[:200])]) == 0
    assert ctx.pos_min(1) == 1000 + SINKS + WINDOW + 2 * GROUP - 1 and ctx.pos_max(1) == 1199
    assert np.abs(ctx.logits() - want).max() < 0.05
    assert ctx.rm(1, 1195, -1) and ctx.pos_max(1) == 1194 and not ctx.rm(1, 1127, -1)


@pytest.mark.parametrize("start", [0, 100, 126])
@pytest.mark.parametrize("after", [1, 40, 90])
def test_an_abort_leaves_no_half_compacted_sequence(tca_model: Path, ids: list[int], start: int, after: int) -> None:
    """Whatever an aborted micro-batch did to some layers, no later token may be computed from it."""
    calls, limit = 0, [10**9]

    def abort() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit[0]

    with Context(tca_model, n_seq_max=2, n_ctx=1024, abort=abort) as c, Context(tca_model) as fresh:
        c.feed(ids[:90], seq=1)
        if start:
            c.feed(ids[:start])
        calls, limit[0] = 0, after
        status = c.batch([(t, start + i, [0], False) for i, t in enumerate(ids[start:300])])
        limit[0] = 10**9
        assert status == 2  # aborted
        n, _ = c.sequence()
        assert n in (0, start)
        assert c.sequence(1) == (90, 0)
        got = c.feed(ids[n:300])
        want = fresh.feed(ids[:300])
        assert same_positions(c.positions(), fresh.positions())
        assert np.abs(got - want).max() < 1e-3
