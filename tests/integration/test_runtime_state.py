"""Saved states: an exact continuation, and a clean refusal of everything that is not one."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime_context import CONFIGS, F16, F32, FIRST, GROUP, Q8_0, SINKS, WINDOW, Context, make_budgets, same_positions
from tca_gguf import gguf_file

MAGIC = b"TCSTAT02"  # of our part of a state


@pytest.fixture
def ctx(tca_model: Path) -> Iterator[Context]:
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as c:
        yield c


@pytest.mark.parametrize("types", [(0, 0), (F16, F16), (Q8_0, Q8_0)], ids=str)
def test_a_whole_state(tca_model: Path, ids: list[int], types: tuple[int, int]) -> None:
    settings = dict(n_ctx=1024, n_seq_max=2, type_k=types[0], type_v=types[1])
    with Context(tca_model, **settings) as a, Context(tca_model, **settings) as b:
        a.feed(ids[:300])
        a.feed(ids[:70], seq=1)
        state = a.save()
        b.feed(ids[200:450])  # something to be replaced
        assert b.load(state) == len(state)
        for seq in (0, 1):
            assert b.sequence(seq) == a.sequence(seq) and b.pos_min(seq) == a.pos_min(seq)
            assert same_positions(a.positions(seq), b.positions(seq))
        assert b.save()[-1000:] == state[-1000:] and len(b.save()) == len(state)
        assert np.array_equal(a.feed(ids[300:400]), b.feed(ids[300:400]))  # bit by bit
        assert np.array_equal(a.feed(ids[70:90], seq=1), b.feed(ids[70:90], seq=1))
        assert same_positions(a.positions(), b.positions())


def test_one_sequence_into_another(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    ctx.feed(ids[100:160], seq=1)
    state = ctx.save(0)
    with Context(tca_model, n_ctx=2048, n_seq_max=4) as other:  # n_ctx a sequence is the same: 512
        other.feed(ids[:90], seq=1)
        other.feed(ids[:200], seq=3)
        kept = other.positions(1)
        assert other.load(state, 3) == len(state)
        assert other.sequence(3) == (300, 3) and same_positions(other.positions(3), ctx.positions(0))
        assert same_positions(other.positions(1), kept)
        assert np.array_equal(ctx.feed(ids[300:400]), other.feed(ids[300:400], seq=3))
    assert ctx.load(state, 0) == len(state)  # back in time
    assert ctx.sequence() == (300, 3)
    assert ctx.load(ctx.save(1), 0) and ctx.sequence(0) == (60, 0)  # a short one over a long one


def test_a_rolled_back_and_an_empty_sequence(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    n = SINKS + WINDOW + 3 * GROUP
    ctx.feed(ids[: n + 30])
    assert ctx.rm(0, n, -1)  # as far as it goes
    state, empty = ctx.save(0), ctx.save(1)
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as other:
        assert other.load(state, 1) == len(state) and other.sequence(1) == (n, 3)
        assert np.array_equal(ctx.feed(ids[n:330]), other.feed(ids[n:330], seq=1))
        assert other.load(empty, 1) == len(empty) and other.sequence(1) == (0, 0) and other.pos_max(1) == -1


def test_a_copy_that_was_not_made_yet_is_saved(ctx: Context, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    ctx.C.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    state = ctx.save(1)
    ctx.rm(1, 0, -1)
    assert ctx.load(state, 1) and same_positions(ctx.positions(0), ctx.positions(1))
    assert np.abs(ctx.feed(ids[300:310]) - ctx.feed(ids[300:310], seq=1)).max() < 1e-3


def usable(c: Context, ids: list[int], seq: int) -> None:
    """After a failed restore a sequence that was empty still is, and as good as new."""
    assert c.sequence(seq) == (0, 0) and c.pos_max(seq) == -1
    assert np.isfinite(c.feed(ids[:200], seq)).all() and c.sequence(seq) == (200, 2)


def test_truncated_states(ctx: Context, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    state, want = ctx.save(0), ctx.positions(0)
    start = state.index(MAGIC)
    cuts = {0, 1, start, start + 3, *range(start + 4, start + 60, 8), len(state) // 2, len(state) - 1}
    for cut in sorted(cuts):
        assert ctx.load(state[:cut], 1) == 0, cut
        usable(ctx, ids, 1)
        assert same_positions(ctx.positions(0), want)  # the other sequence does not notice
        assert ctx.rm(1, 0, -1)
    assert ctx.load(state, 1) == len(state)


def test_hostile_states(ctx: Context, ids: list[int]) -> None:
    """Counters that no sequence can have would write outside the regions, or count groups that never went."""
    ctx.feed(ids[:300])
    state = ctx.save(0)
    at = state.index(MAGIC)
    fields = {name: at + i for name, i in dict(magic=0, fingerprint=8, n_seqs=16, partial=20, n_tokens=24, n_groups=28, pos0=32, n_listed=36,
                                               before=40, size=48 + 4 * 300).items()}  # fmt: skip
    assert struct.unpack_from("<4i", state, fields["n_tokens"]) == (300, 3, 0, 300)
    cases = [(name, value) for name in fields for value in (-1, 2**31 - 1, -(2**31))]
    cases += [("n_tokens", n) for n in (0, 1, 207, 320, 512, 513)] + [("n_groups", n) for n in (0, 1, 2, 4, 6, 7, 8)]
    cases += [("n_seqs", 0), ("n_seqs", 2), ("partial", 1), ("pos0", 1), ("n_listed", 299), ("n_listed", 301), ("size", 0), ("size", 299)]
    for name, value in cases:
        changed = bytearray(state)
        struct.pack_into("<i", changed, fields[name], value)
        assert ctx.load(bytes(changed), 1) == 0, (name, value)
        assert ctx.sequence(1) == (0, 0), (name, value)
    both = bytearray(state)  # full to the brim and never compacted
    struct.pack_into("<2i", both, fields["n_tokens"], 512, 0)
    assert ctx.load(bytes(both) + bytes(4 << 20), 1) == 0
    usable(ctx, ids, 1)

    assert ctx.rm(1, -1, -1)
    rng = np.random.default_rng(1)
    for _ in range(300):  # anything in the first bytes; rows themselves are only numbers
        changed = bytearray(state)
        for i in rng.integers(at, at + 48, rng.integers(1, 4)):
            changed[i] = int(rng.integers(256))
        n = ctx.load(bytes(changed), 1)
        assert ctx.sequence(1) in ((0, 0), (300, 3)) and n in (0, len(state))
    assert ctx.sequence(0) == (300, 3)


def test_states_of_another_context(ctx: Context, tca_model: Path, stock_model: Path, tmp_path: Path, ids: list[int]) -> None:
    ctx.feed(ids[:300])
    state, whole = ctx.save(0), ctx.save()

    def refused(c: Context, by_sequence: bool = True) -> None:
        if by_sequence:
            assert c.load(state, 0) == 0
            usable(c, ids, 0)
            assert c.rm(0, 0, -1)
        assert c.load(whole) == 0
        usable(c, ids, 0)

    with Context(tca_model, type_k=F16, n_ctx=1024, n_seq_max=2) as c:
        refused(c)
    with Context(tca_model, n_ctx=256) as c:  # 300 tokens do not fit
        refused(c)
    with Context(tca_model, n_ctx=1536, n_seq_max=3) as c:
        refused(c, by_sequence=False)
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as c, Context(stock_model, n_ctx=1024, n_seq_max=2) as stock:
        stock.feed(ids[:100])
        foreign = stock.save(0)
        assert stock.load(state, 1) == 0 and stock.pos_max(1) == -1  # ours into the stock cache
        assert c.load(foreign, 0) == 0  # and the other way round
        usable(c, ids, 0)

    path = tmp_path / "other.gguf"  # other budgets, regions of other lengths
    shape = gguf_file.model_shape(stock_model)
    gguf_file.embed_budgets(stock_model, path, make_budgets(stock_model, head_config=np.full((shape.n_layer, shape.n_head_kv), len(CONFIGS) - 1, np.int32)))
    with Context(path, n_ctx=1024, n_seq_max=2) as c:
        refused(c)


def test_a_file(ctx: Context, tca_model: Path, tmp_path: Path, ids: list[int]) -> None:
    path = str(tmp_path / "sequence.bin").encode()
    C = ctx.C
    ctx.feed(ids[:300])
    tokens = (C.llama_token * 300)(*ids[:300])
    size = C.llama_state_seq_save_file(ctx.ctx, path, 0, tokens, 300)
    assert size == Path(path.decode()).stat().st_size > 0
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as other:
        out, n = (C.llama_token * 400)(), __import__("ctypes").c_size_t()
        assert C.llama_state_seq_load_file(other.ctx, path, 1, out, 400, n) == size
        assert n.value == 300 and list(out[:300]) == ids[:300]
        assert same_positions(ctx.positions(), other.positions(1))
        assert np.array_equal(ctx.feed(ids[300:320]), other.feed(ids[300:320], seq=1))
        Path(path.decode()).write_bytes(Path(path.decode()).read_bytes()[: size // 2])
        assert other.rm(1, -1, -1) and C.llama_state_seq_load_file(other.ctx, path, 1, out, 400, n) == 0
        usable(other, ids, 1)


def test_a_state_that_is_refused_leaves_the_old_one(ctx: Context, tca_model: Path, ids: list[int], tmp_path: Path) -> None:
    """Cut anywhere, from memory and from a file: the sequence goes on as if nothing had been tried, to the bit."""
    ctx.feed(ids[:300])
    state = ctx.save(0)
    path = str(tmp_path / "sequence.bin").encode()
    tokens = (ctx.C.llama_token * 300)(*ids[:300])
    size = ctx.C.llama_state_seq_save_file(ctx.ctx, path, 0, tokens, 300)
    whole = Path(path.decode()).read_bytes()
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as other, Context(tca_model, n_ctx=1024, n_seq_max=2) as untouched:
        for c in (other, untouched):
            c.feed(ids[100:330], seq=1)
        before, out, n = other.save(1), (ctx.C.llama_token * 400)(), ctypes.c_size_t()
        for part in (0.01, 0.3, 0.6, 0.9, 0.9999):
            assert other.load(state[: int(part * len(state))], 1) == 0
            Path(path.decode()).write_bytes(whole[: int(part * size)])
            assert ctx.C.llama_state_seq_load_file(other.ctx, path, 1, out, 400, n) == 0
            assert other.save(1) == before
        assert np.array_equal(other.feed(ids[330:400], 1), untouched.feed(ids[330:400], 1))


# ---- partial states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [(F32, F32), (F16, Q8_0)], ids=str)
def test_a_partial_state_brings_a_sequence_back(tca_model: Path, ids: list[int], types: tuple[int, int]) -> None:
    """Over what came later, whole groups of it compacted: to the very state that was saved, its future too."""
    settings = dict(n_ctx=1024, type_k=types[0], type_v=types[1])
    with Context(tca_model, **settings) as c:
        saved = []
        for n in (20, 100, FIRST, FIRST + 1, 200, 256, 300):
            c.feed(ids[c.pos_max() + 1 : n])
            saved.append((n, c.save(0, partial=True), c.save(0)))
        c.feed(ids[300:450])
        for n, partial, whole in reversed(saved):
            assert c.load(partial, 0, partial=True) == len(partial)
            assert c.pos_max() == n - 1 and c.save(0) == whole
            a = c.feed(ids[350:360]) if n % 2 else None  # another future, which the next one does not notice
            if a is not None:
                with Context(tca_model, **settings) as fresh:
                    assert fresh.load(whole, 0) and np.array_equal(fresh.feed(ids[350:360]), a)


def test_a_partial_state_does_not_grow(tca_model: Path, ids: list[int]) -> None:
    text = [*ids, *ids]
    with Context(tca_model, n_ctx=1024) as c:
        sizes = []
        for groups in range(1, 14):
            n = SINKS + WINDOW + groups * GROUP + 30
            c.feed(text[c.pos_max() + 1 : n])
            sizes.append(len(c.save(0, partial=True)))
        info, shape = c.info(), c.sequence()
        rows = (WINDOW + 30) * info.n_layer * info.n_head_kv * (2 * 64 * 4 + 4)
        assert len(set(sizes)) == 1 and rows < sizes[0] < 1.1 * rows, (sizes, rows, shape)


def test_partial_states_of_other_texts_are_refused(ctx: Context, tca_model: Path, ids: list[int]) -> None:
    """The core rows that such a state continues must be those of the same tokens; short ones hold everything themselves."""
    ctx.feed(ids[:300])
    partial = ctx.save(0, partial=True)
    with Context(tca_model, n_ctx=1024, n_seq_max=2) as other:
        other.feed(ids[:40])
        short = other.save(0, partial=True)
        other.rm(0, -1, -1)
        for text in ([], ids[:200], ids[1:400], [*ids[:255], 7, *ids[256:400]]):  # nothing, too little, another, one token another
            if text:
                other.feed(text)
            before = other.save(0)
            assert other.load(partial, 0, partial=True) == 0 and other.save(0) == before
            assert "evaluate the text again" in "".join(Context.lines)
            other.rm(0, -1, -1)
        other.feed([*ids[:256], 9, 9, 9])  # what differs lies behind the last compaction: the state has that itself
        assert other.load(partial, 0, partial=True) == len(partial) and other.sequence() == (300, 3)
        assert np.array_equal(other.feed(ids[300:310]), ctx.feed(ids[300:310]))
        assert other.load(short, 1, partial=True) == len(short) and other.sequence(1) == (40, 0)
        assert other.load(partial, 0) == 0 and other.load(ctx.save(0), 0, partial=True) == 0  # one kind for the other


def test_a_partial_state_in_another_sequence(tca_model: Path, ids: list[int]) -> None:
    """In a copy, in a shared context whose rooms move."""
    with Context(tca_model, n_ctx=1024, n_seq_max=3, kv_unified=True) as c:
        c.feed(ids[:300])
        partial, whole = c.save(0, partial=True), c.save(0)
        c.feed(ids[300:420])
        c.C.llama_memory_seq_cp(c.memory, 0, 2, -1, -1)
        c.feed(ids[:150], seq=1)
        assert c.load(partial, 2, partial=True) == len(partial) and c.sequence(2) == (300, 3) and c.sequence(0) == (420, 5)
        assert c.save(2)[8:] == whole[8:]  # all but the number of the sequence
