"""Every served architecture on random weights: the ragged cache against the stock one, and against the plain reference selection.

One case: pytest tests/integration/test_archs.py -k 'minimax-m2'.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime_context import CONFIGS, F16, FIRST, GROUP, KEEP_COUNTS, Q8_0, SINKS, WINDOW, BLOCK, Context, LoadError, same_positions
from tca_gguf import gguf_file, native
from tca_gguf.budgets import DENSE, Budgets
from tca_gguf.calib.pipeline import calibrate
from tca_gguf.calib.runtime import Model
from tiny_models import BUDGETS, BY_NAME, REFUSED, REFUSED_KEYS, SERVED, Tiny, TinyModel, write_file

N = 300  # tokens: three groups are compacted
EVERY = 29
EARLY = 4  # rows of logits of tokens before the first compaction: 0, 29, 58, 87
TOLERANCE = 2e-4  # of the largest logit: f32 sums in another order through all layers; up to 2e-5 was seen


def budgets_of(model: TinyModel, heads: object) -> Budgets:
    """heads: head_config of the stored layers."""
    return Budgets(version=1, block_size=BLOCK, group_size=GROUP, window=WINDOW, sinks=SINKS, metric="key-diff", keep_counts=KEEP_COUNTS,
                   configs=CONFIGS, head_config=model.heads(heads), kept_fraction=0.5)  # fmt: skip


class Case:
    """A model with budgets of every kind, its stock logits and the run that others are compared with."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.model = TinyModel(tiny)
        self.shape = native.model_shape(self.model.address)
        rng = np.random.default_rng(8)
        self.ids = [int(t) for t in rng.integers(0, 256, N)]
        n_stored = len(self.shape.stored)
        heads = rng.permutation(np.resize([1, DENSE, 2, 0, 3, 4], n_stored * self.shape.n_head_kv))
        self.budgets = self.make(heads.reshape(n_stored, self.shape.n_head_kv))
        self.dense = self.make(DENSE)
        with self.context(None) as c:
            self.stock = c.feed(self.ids, every=EVERY)
        with self.context(self.budgets) as c:
            self.logits = c.feed(self.ids, every=EVERY)
            self.positions = c.positions()

    def make(self, heads: object) -> Budgets:
        return budgets_of(self.model, heads)

    def context(self, budgets: Budgets | None, **settings: object) -> Context:
        self.model.set_budgets(budgets)
        return Context(self.model, **settings)

    def close(self) -> None:
        self.model.close()


def scale(logits: np.ndarray) -> float:
    return float(np.abs(logits).max())


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.isfinite(a).all() and np.abs(a - b).max() < TOLERANCE * max(1.0, scale(b)))


@pytest.fixture(scope="module", params=SERVED, ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(request.param)
    yield case
    case.close()


def test_shape_is_the_runtimes(case: Case) -> None:
    stored = case.tiny.stored
    assert case.shape.stored == (tuple(range(case.shape.n_layer)) if stored is None else stored)
    for layer in range(case.shape.n_layer):
        for head in range(case.shape.n_head_kv):
            held = len(case.positions[layer * case.shape.n_head_kv + head])
            assert held == native.plan_length(case.budgets, layer, head, N) and (held > 0) == (layer in case.shape.stored)


def test_without_budgets_nothing_changes(case: Case) -> None:
    """A model whose budgets were taken off again is the stock one, bit for bit."""
    with case.context(None) as c:
        assert not c.info().active
        assert np.array_equal(c.feed(case.ids, every=EVERY), case.stock)


def test_dense_budgets_are_the_stock_cache(case: Case) -> None:
    with case.context(case.dense) as c:
        assert c.info().active
        assert near(c.feed(case.ids, every=EVERY), case.stock)


def test_only_late_logits_change(case: Case) -> None:
    assert near(case.logits[:EARLY], case.stock[:EARLY])
    assert np.abs(case.logits[EARLY + 1 :] - case.stock[EARLY + 1 :]).max() > 20 * TOLERANCE * max(1.0, scale(case.stock))


@pytest.mark.parametrize("n_ubatch", [7, 100])
def test_micro_batches_do_not_matter(case: Case, n_ubatch: int) -> None:
    with case.context(case.budgets, n_ubatch=n_ubatch) as c:
        assert near(c.feed(case.ids, every=EVERY), case.logits)
        assert same_positions(c.positions(), case.positions)


def captured_keys(model: TinyModel, ids: list[int], shape: native.ModelShape) -> tuple[dict[int, np.ndarray], dict[int, native.Rope]]:
    """Keys that the stock f16 cache holds after the tokens, [n_head_kv, len(ids), head_dim_k] of every stored layer, and their RoPE."""
    keys: dict[int, np.ndarray] = {}

    def on_layer(qkv: object) -> None:
        if qkv.layer in shape.stored:
            assert qkv.k.shape == (shape.n_head_kv, qkv.n_kv, shape.head_dim_k) and qkv.v.shape[2] == shape.head_dim_v
            keys[qkv.layer] = qkv.k.copy()

    model.set_budgets(None)
    capture = native.Capture(on_layer)
    with Context(model, type_k=F16, type_v=F16, flash=1, capture=capture) as c:
        c.feed(ids)
        ropes = {layer: native.context_rope(c.address, layer) for layer in shape.stored}
    assert capture.error is None and sorted(keys) == list(shape.stored)
    return keys, ropes


def unrotated(keys: np.ndarray, rope: native.Rope) -> np.ndarray:
    """Keys [..., n_tokens, head_dim] without the rotation of positions 0, 1, ..."""
    out = keys.astype(np.float64)
    if rope.n_rot == 0:
        return out
    n = rope.n_rot
    first, second = (slice(0, n // 2), slice(n // 2, n)) if rope.type == 2 else (slice(0, n, 2), slice(1, n, 2))
    angle = np.arange(keys.shape[-2])[:, None] * rope.freqs.astype(np.float64)
    x, y = out[..., first] / rope.scale, out[..., second] / rope.scale
    out[..., first], out[..., second] = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return out


def test_rope_is_what_the_graph_does(case: Case) -> None:
    """Of a text that repeats one token every key is the same but for its rotation, in every layer: what is taken back makes them alike."""
    if case.tiny.positions:
        pytest.skip("positions are in the embeddings, so keys differ")
    # a recurrent state changes with every token, and the share of an attention sink does
    model = TinyModel(case.tiny, mute=True) if case.tiny.recurrent or case.tiny.sinks else case.model
    keys, ropes = captured_keys(model, [7] * 60, case.shape)
    if model is not case.model:
        model.close()
    for layer in case.shape.stored:
        plain = unrotated(keys[layer], ropes[layer])
        spread = np.abs(plain - plain[:, :1]).max() / np.abs(plain).max()
        if case.tiny.opaque:
            assert ropes[layer].n_rot == 0 and spread > 0.1  # a rotation that no table can say: keys are ranked as they are
        else:
            assert spread < 1e-2, f"layer {layer}: {spread}, {ropes[layer]}"  # keys of f16


def test_kept_positions_are_the_references(case: Case) -> None:
    """The first group is ranked on keys that no eviction touched, so the plain reference on the stock cache's keys says what stays."""
    keys, ropes = captured_keys(case.model, case.ids[:FIRST], case.shape)
    group = slice(SINKS, SINKS + GROUP)
    with case.context(case.budgets) as c:
        c.feed(case.ids[:FIRST])
        positions = c.positions()
    checked = 0
    for layer in case.shape.stored:
        for head in range(case.shape.n_head_kv):
            config = case.budgets.head_config[layer, head]
            counts = CONFIGS[config] if config != DENSE else [0] * (len(KEEP_COUNTS) - 1) + [GROUP // BLOCK]
            kept, scores = native.select(keys[layer][head, group], np.arange(group.start, group.stop, dtype=np.int32), ropes[layer], BLOCK,
                                         KEEP_COUNTS, counts, metric="key-diff", impl="reference")  # fmt: skip
            want = np.concatenate([np.arange(SINKS), SINKS + np.asarray(kept), np.arange(group.stop, FIRST)])
            got = positions[layer * case.shape.n_head_kv + head]
            assert len(got) == len(want)
            # f32 here, f16 keys of another attention there: what differs must be a near tie
            for a, b in zip(sorted(set(got) - set(want)), sorted(set(want) - set(got)), strict=True):
                assert abs(scores[a - SINKS] - scores[b - SINKS]) < 0.02, (layer, head, a, b)
                checked -= 1
            checked += len(kept)
    assert checked > 0


def test_a_planted_key_stays(case: Case) -> None:
    """A probe along one token's key keeps that token in every head that keeps any of its block; the opposite probe drops it, and the
    difference reaches the logits long after."""
    planted = SINKS + 21
    keys, ropes = captured_keys(case.model, case.ids[:FIRST], case.shape)
    probe = np.zeros((case.shape.n_layer, case.shape.n_head_kv, case.shape.head_dim_k), np.float32)
    for layer in case.shape.stored:
        plain = unrotated(keys[layer], ropes[layer])
        probe[layer] = plain[:, planted] / np.linalg.norm(plain[:, planted], axis=-1, keepdims=True)
        away = plain[:, SINKS : SINKS + GROUP] @ probe[layer][:, :, None].astype(np.float64)
        assert (away.argmax(axis=1) == planted - SINKS).mean() > 0.5  # a key of its own, in most heads
    logits = []
    for sign in (1.0, -1.0):
        one_a_block = np.array([[0, GROUP // BLOCK, 0, 0, 0, 0]], np.int32)
        budgets = replace(case.make(0), configs=one_a_block, metric="key-probe", probe=sign * probe)
        with case.context(budgets) as c:
            logits.append(c.feed(case.ids))
            stays = [planted in c.positions()[layer * case.shape.n_head_kv + head] for layer in case.shape.stored for head in range(case.shape.n_head_kv)]
            assert np.mean(stays) > 0.5 if sign > 0 else not any(stays), stays
    assert np.abs(logits[0] - logits[1]).max() > 20 * TOLERANCE * max(1.0, scale(case.stock))


def test_a_tail_is_taken_back(case: Case) -> None:
    with case.context(case.budgets, n_ubatch=64) as c:
        c.feed(case.ids)
        if case.tiny.recurrent:  # the recurrent state goes back no further, and says so
            assert not c.rm(0, N - 9, -1) and c.pos_max() == N - 1 and same_positions(c.positions(), case.positions)
            assert c.rm(0, -1, -1) and c.pos_max() == -1
            assert near(c.feed(case.ids), case.logits[-1])
            return
        edge = SINKS + WINDOW + c.sequence()[1] * GROUP
        assert not c.rm(0, edge - GROUP - 1, -1) and c.pos_max() == N - 1  # over two compactions
        for p in (N - 9, edge - 20):  # behind the last one, and over it
            assert c.rm(0, p, -1) and c.pos_max() == p - 1
            assert near(c.feed(case.ids[p:]), case.logits[-1])
            assert same_positions(c.positions(), case.positions)


def test_state_is_restored(case: Case) -> None:
    with case.context(case.budgets) as a, case.context(case.budgets) as b:
        a.feed(case.ids[: N - 40])
        for seq in (None, 0):
            saved = a.save(seq)
            assert b.load(saved, seq) == len(saved) and same_positions(a.positions(), b.positions())
            b.rm(0, -1, -1)
        assert b.load(saved, 0) == len(saved)
        assert near(b.feed(case.ids[N - 40 :]), case.logits[-1])
        assert same_positions(b.positions(), case.positions)


@pytest.mark.parametrize("further", [10, 20])
def test_checkpoint_and_restore(case: Case, further: int) -> None:
    """A partial state, as llama-server keeps one at user turns, is restored over the sequence after it went on: before the next
    compaction (at 256 tokens) and over it."""
    at = 240
    with case.context(case.budgets, n_ubatch=64) as c:
        c.feed(case.ids[:at])
        saved = c.save(0, partial=True)
        c.feed(case.ids[:further])  # another text
        assert c.sequence()[1] == 2 + (further > 16)
        assert c.load(saved, 0, partial=True) == len(saved) and c.pos_max() == at - 1
        assert near(c.feed(case.ids[at:]), case.logits[-1])
        assert same_positions(c.positions(), case.positions)


def side_by_side(case: Case, c: Context) -> np.ndarray:
    """Feeds the text to sequence 0 and its parts backwards to sequence 1, in common batches. Last logits of sequence 0."""
    for at in range(0, N, 100):
        part, other = case.ids[at : at + 100], case.ids[at : at + 100][::-1]
        assert c.batch([(t, at + i, [0], i == len(part) - 1) for i, t in enumerate(part)] +
                       [(t, at + i, [1], False) for i, t in enumerate(other)]) == 0  # fmt: skip
    return c.logits(99)


def test_two_sequences(case: Case) -> None:
    if case.tiny.mixes:  # llama.cpp itself gives a sequence other logits beside another one: then dense budgets give the same
        with case.context(None, n_ctx=2048, n_seq_max=2) as c, case.context(case.dense, n_ctx=2048, n_seq_max=2) as d:
            wrong = side_by_side(case, c)
            assert not near(wrong, case.stock[-1]) and near(side_by_side(case, d), wrong)
            return
    with case.context(case.budgets, n_ctx=2048, n_seq_max=2) as c:
        assert near(side_by_side(case, c), case.logits[-1])
        assert same_positions(c.positions(0), case.positions) and not same_positions(c.positions(1), case.positions)


def test_quantized_cache(case: Case) -> None:
    """Before any group goes as close to the exact cache as the stock one of that type; and it goes on."""
    early = case.ids[: FIRST - 1]
    with case.context(None, type_k=Q8_0, type_v=Q8_0) as c:
        noise = np.abs(c.feed(early, every=EVERY)[:EARLY] - case.stock[:EARLY]).max()
    with case.context(case.budgets, type_k=Q8_0, type_v=Q8_0) as c:
        assert np.abs(c.feed(early, every=EVERY)[:EARLY] - case.stock[:EARLY]).max() <= 2 * noise
        assert np.isfinite(c.feed(case.ids[FIRST - 1 :])).all()


# one of each kind: other heads in layers that llama.cpp keeps, prediction layers, several positions, halves of keys, no attention, ...
CALIBRATED = ["llama", "gpt2", "glm4moe", "qwen3vl", "minicpm3", "deci", "gemma3", "gemma4", "llama4", "step35", "qwen35", "nemotron_h_moe",
              "falcon-h1", "lfm2", "gpt-oss", "deepseek2-latent"]  # fmt: skip


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_knows_the_shape(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file without budgets to one whose budgets run: the shape is the runtime's from end to end."""
    monkeypatch.setattr(Model, "tokenize", lambda self, text, first=False, special=False: [zlib.crc32(w.encode()) % 256 for w in text.split()])
    model = TinyModel(BY_NAME[name], keep_tensors=True)
    shape = native.model_shape(model.address)
    path = model.write(tmp_path / "plain.gguf")
    model.close()
    assert gguf_file.model_shape(path).stored == shape.stored
    budgets = calibrate(path, keep=0.5, tokens=600, block_size=BLOCK, group_size=GROUP, window=WINDOW, sinks=SINKS)
    assert tuple(budgets.stored_layers()) == shape.stored and budgets.head_config.shape == (shape.n_layer, shape.n_head_kv)
    gguf_file.embed_budgets(path, tmp_path / "tca.gguf", budgets)
    assert native.file_check(tmp_path / "tca.gguf")
    with Context(tmp_path / "tca.gguf") as c:
        assert c.info().active and np.isfinite(c.feed([7 * i % 256 for i in range(N)])).all()
        assert sum(len(p) > 0 for p in c.positions()) == len(shape.stored) * shape.n_head_kv


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([0] * 8, r"head_config\[0\] is 0, but layer 0 of this model has no attention \(a recurrent layer\), so it must be -2"),
        ([-2] * 6 + [0, 0], r"head_config\[2\] is -2, but layer 1 of this model has full attention, so it must not be -2"),
        ([-2, -2, 0, 0, -2, -2], "has 6 entries, this model has 4 layers of 2 KV heads = 8"),
        ([-2, 0, 0, 0, -2, -2, 0, 0], "-2 .* holds for every head of a layer or for none"),
        ([-2, -2, 0, 7, -2, -2, 0, 0], r"head_config\[3\] is 7"),
    ],
)
def test_budgets_of_another_shape_are_refused(heads: list[int], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        TinyModel(BY_NAME["qwen35"], extra={**BUDGETS, "tca.head_config": heads})


def test_attention_in_both_directions() -> None:
    """What the images of Gemma 3 ask for is refused in one line; Gemma 4's concern the sliding-window layers alone and are served."""
    model = TinyModel(BY_NAME["gemma3"])
    model.set_budgets(budgets_of(model, DENSE))
    with Context(model) as c:
        c.feed(list(range(40)))
        c.C.llama_set_causal_attn(c.ctx, False)
        assert c.batch([(i, 40 + i, [0], i == 19) for i in range(20)]) < 0 and c.pos_max() == 39
        assert sum("attends in both directions" in line and "tca.enabled=bool:false" in line for line in c.lines) == 1
        c.C.llama_set_causal_attn(c.ctx, True)
        assert c.batch([(i, 40 + i, [0], i == 19) for i in range(20)]) == 0
    model.close()
    model, logits = TinyModel(BY_NAME["gemma4"]), []
    for budgets in (None, budgets_of(model, DENSE)):
        model.set_budgets(budgets)
        with Context(model) as c:
            c.feed(list(range(40)))
            c.C.llama_set_causal_attn(c.ctx, False)
            assert c.batch([(i, 40 + i, [0], i == 9) for i in range(20)]) == 0
            logits.append(c.logits(9))
    assert near(logits[1], logits[0])
    model.close()


def test_attention_metrics_do_not_know_sinks() -> None:
    model = TinyModel(BY_NAME["gpt-oss"])
    model.set_budgets(replace(budgets_of(model, 1), metric="observed-attn"))
    with pytest.raises(LoadError, match="observed-attn looks at attention and does not know the attention sinks"):
        Context(model)
    model.close()


def test_an_assistant_does_not_read_the_ragged_cache(tmp_path: Path) -> None:
    """Gemma 4's drafter takes cells of the target's cache, which a ragged one does not have."""
    target = TinyModel(BY_NAME["gemma4"])
    keys = {**BY_NAME["gemma4"].keys, "embedding_length": 128, "embedding_length_out": 256, "nextn_predict_layers": 4}
    shapes = {"token_embd": (256, 128), "output_norm": (128,), "rope_freqs": (64,), "nextn.post_projection": (256, 128), "nextn.pre_projection": (128, 512)}
    for layer, dim in enumerate((64, 128, 64, 128)):
        layers = {"attn_norm": (128,), "attn_q": (4 * dim, 128), "attn_output": (128, 4 * dim), "attn_q_norm": (dim,), "ffn_norm": (128,),
                  "post_attention_norm": (128,), "layer_output_scale": (1,), "ffn_gate": (128, 128), "ffn_up": (128, 128), "ffn_down": (128, 128),
                  "post_ffw_norm": (128,)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in layers.items()}
    path = write_file(tmp_path / "assistant.gguf", Tiny("gemma4-assistant", keys, layers=4),
                      {f"{name}.weight": np.full(shape, 0.1, np.float32) for name, shape in shapes.items()})  # fmt: skip
    for budgets, words in ((budgets_of(target, DENSE), "reads the KV cache of its target"), (None, "")):
        target.set_budgets(budgets)
        with Context(target) as c:
            if words:
                with pytest.raises(LoadError, match=words):
                    Context(path, other=c.ctx)
            else:
                Context(path, other=c.ctx).close()
    target.close()


def test_images_of_several_positions_are_refused() -> None:
    """The tokens of an image of Qwen-VL share their first position."""
    model = TinyModel(BY_NAME["qwen3vl"])
    model.set_budgets(budgets_of(model, DENSE))
    with Context(model) as c:
        c.feed(list(range(40)))
        batch = c.C.llama_batch_init(4, 256, 1)
        batch.n_tokens = 4
        positions = (ctypes.c_int32 * 16)(*[40] * 8, 40, 41, 40, 41, *[0] * 4)  # time, height, width, nothing, each for every token
        own = ctypes.cast(batch.pos, ctypes.c_void_p).value
        batch.pos = ctypes.cast(positions, type(batch.pos))
        for i in range(4):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == 3
        ctypes.memset(batch.embd, 0, 4 * 256 * 4)
        assert c.C.llama_decode(c.ctx, batch) != 0 and c.pos_max() == 39
        batch.pos = ctypes.cast(own, type(batch.pos))
        c.C.llama_batch_free(batch)
        assert any("images of this model" in line and "tca.enabled=bool:false" in line for line in c.lines)
        assert np.isfinite(c.feed([1, 2, 3])).all()
    model.close()


# Architectures that llama.cpp itself refuses with these keys: it has no graph, or they are no model of their own.
NOT_LOADED = {"gptj", "eagle3", "dflash", "graniteswitch", "dots3note", "qwen4exp"}


def test_every_served_architecture_has_a_row() -> None:
    assert {arch.name for arch in native.architectures() if arch.served} == {tiny.arch for tiny in SERVED}


@pytest.mark.parametrize("arch", [arch for arch in native.architectures() if not arch.served], ids=lambda arch: arch.name)
def test_refused_architectures_say_why(arch: native.Architecture) -> None:
    tiny = Tiny(arch.name, {**REFUSED, **REFUSED_KEYS.get(arch.name, {})}, layers=4)
    with pytest.raises(RuntimeError) as error:
        TinyModel(tiny, extra=BUDGETS)
    lines = [line for line in str(error.value).splitlines() if "error loading model" in line]
    assert len(lines) == 1 and arch.remark
    if arch.name not in NOT_LOADED:
        assert f"architecture '{arch.name}': {arch.remark}" in lines[0] and "strip-budgets" in lines[0]
