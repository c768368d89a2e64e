"""bench without a model: the arithmetic, the order of measurements over fake contexts, the picture."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from gguf_samples import make_budgets, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from tca_gguf import bench, gguf_file, native
from tca_gguf.bench import Attention, Row, Sample, Settings, cases, measure, plot, results
from tca_gguf.errors import TcaError

SHAPE = gguf_file.ModelShape("llama", "m", 2, 4, 2, 64, 64, 8192)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 20))
def test_attention_work_counts_every_visible_slot(lengths, n):
    seen = sum(length + t + 1 for length in lengths for t in range(n))
    n_bytes, flops = results.attention_work(lengths, n, n_head=6, n_head_kv=2, head_dims=(64, 32), row_bytes=192)
    assert n_bytes * n == pytest.approx(192 * seen)
    assert flops * n == pytest.approx(3 * (2 * 64 + 2 * 32) * seen)  # three query heads a KV head; a multiply-add is two


def test_attention_rates():
    a = Attention(ms=2.0, bytes=50e6, flops=300e6)
    assert a.gbps == pytest.approx(25) and a.gflops == pytest.approx(150)


def test_slope_of_a_line():
    line = [(depth, 1e3 / (10 + 0.5 * depth / 1024)) for depth in (512, 4096, 16384)]
    assert results.slope(line) == pytest.approx(0.5)
    assert results.slope(line[:1]) is None and results.slope(line[:1] * 2) is None
    noisy = [(1024, 1e3 / 11), (2048, 1e3 / 11), (3072, 1e3 / 13)]
    assert results.slope(noisy) == pytest.approx(1.0)  # (13 - 11)/2


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([(512, 10, 9), (1024, 10, 9)], None),
        ([(512, 10, 10), (1024, 10, 11)], 512),
        ([(512, 10, 11), (1024, 10, 9)], None),  # faster once is not faster from there on
        ([(512, 10, 11), (1024, 10, 9), (2048, 10, 20)], 1210),
        ([(0, 1e3 / 10, 1e3 / 12), (1000, 1e3 / 20, 1e3 / 18)], 500),  # times cross in the middle
        ([(1000, 1e3 / 20, 1e3 / 18), (0, 1e3 / 10, 1e3 / 12)], 500),
    ],
)
def test_faster_from(points, expected):
    assert results.faster_from(points) == expected


def sample(test="decode", depth=1024, config="tca", tps=(10.0,), budgets=None, kv_type="f16", **more):
    return Sample(test, depth, kv_type, config, budgets if config == "tca" else None, 1000, list(tps), **more)


def test_the_faster_dense_configuration_counts_for_each_test_and_depth():
    samples = [
        sample("prefill", 1024, "fa=0", [90, 100, 95]), sample("prefill", 1024, "fa=1", [80]), sample("prefill", 1024, "tca", [120], "file"),
        sample("decode", 1024, "fa=0", [10]), sample("decode", 1024, "fa=1", [11]), sample("decode", 1024, "tca", [22], "file"),
        sample("decode", 2048, "fa=0", [9]), sample("decode", 2048, "fa=1", [5]), sample("decode", 2048, "tca", [18], "0.25"),
    ]  # fmt: skip
    rows = results.rows_of(samples)
    assert [(r.test, r.depth, r.dense_config, r.dense_tps, r.ratio, r.budgets) for r in rows] == [
        ("prefill", 1024, "fa=0", 95, pytest.approx(120 / 95, abs=1e-4), "file"),
        ("decode", 1024, "fa=1", 11, 2, "file"),
        ("decode", 2048, "fa=0", 9, 2, "0.25"),
    ]


def test_json_keeps_the_fixed_fields_first():
    row = Row("decode", 1, "f16", 10.0, "fa=1", 20.0, 2.0, 100, 40, 0.4, "file", "f16", Attention(4, 8e6, 6e6), Attention(2, 4e6, 3e6, 0.01))
    values = row.as_json()
    assert list(values)[:10] == ["test", "depth", "kv_type", "dense_tps", "dense_config", "tca_tps", "ratio", "dense_kv_bytes",
                                 "tca_kv_bytes", "kv_ratio"]  # fmt: skip
    assert values["attn_ratio"] == 2 and values["dense_attn_gbps"] == 2 and values["tca_attn_bytes"] == 4e6
    assert values["tca_select_share"] == 0.01 and values["dense_attn_ms"] == 4
    bare = replace(row, dense_attn=None, tca_attn=None).as_json()
    assert bare.keys() == values.keys() and bare["attn_ratio"] is None and bare["tca_attn_gflops"] is None
    json.dumps(values)


def test_summary_takes_the_flatter_dense_line():
    samples = []
    for depth in (1024, 2048, 4096):
        x = depth / 1024
        samples += [sample("decode", depth, "fa=0", [1e3 / (20 + 2 * x)]), sample("decode", depth, "fa=1", [1e3 / (10 + 4 * x)]),
                    sample("decode", depth, "tca", [1e3 / (16 + 0.5 * x)], "file")]  # fmt: skip
    (entry,) = results.summary(results.rows_of(samples), samples)
    assert entry["dense_ms_per_1k"] == pytest.approx(2) and entry["tca_ms_per_1k"] == pytest.approx(0.5)
    assert entry["slope_ratio"] == pytest.approx(0.25)
    # 10 + 4x against 16 + x/2: dense is faster at 1K (14 against 16.5) and slower at 2K (18 against 17)
    assert 1024 < entry["tca_faster_from"] < 2048


def test_stall_and_spread():
    assert results.stall([1.0, 1.0, 1.2, 3.0, 1.0]) == {"median_ms": 1.0, "longest_ms": 3.0, "ratio": 3.0}
    assert results.worst_spread([sample(tps=[10, 11, 12]), sample(tps=[10, 10])]) == pytest.approx(2 / 11)
    assert results.worst_spread([]) == 0


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_groups():
    both = Settings(kv_types=("f16", "q8_0"), budgets=("file", "0.25"))
    assert [[c.label for c in group] for group in cases.groups(both)] == [
        ["fa=0 f16", "fa=1 f16", "tca f16", "tca f16, keep 0.25"],
        ["fa=1 q8_0", "tca q8_0", "tca q8_0, keep 0.25"],
    ]
    one = cases.groups(replace(both, dense_kv="f16", flash_attn="off", budgets=("dense",)))
    assert [[c.label for c in group] for group in one] == [["fa=0 f16", "tca f16, dense budgets", "tca q8_0, dense budgets"]]
    with pytest.raises(TcaError, match="only with flash attention"):
        cases.groups(replace(both, flash_attn="off"))


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.39, 0.9, None])
def test_uniform_budgets_are_valid_and_keep_what_was_asked_for(keep):
    for like in (None, make_budgets(n_layer=2, n_head_kv=2), make_budgets(n_layer=2, n_head_kv=2, metric="key-probe")):
        budgets = cases.uniform(SHAPE, keep, like)
        budgets.check()
        assert budgets.metric == (like.metric if like else "key-diff") and budgets.keep_counts == (1, 2, 4, 8, 16)
        assert budgets.head_config.shape == (2, 2) and (keep is not None or (budgets.head_config == -1).all())
        assert budgets.head_kept_fraction().mean() == pytest.approx(1 if keep is None else keep, abs=0.03)
        assert budgets.kept_fraction == pytest.approx(budgets.head_kept_fraction().mean())


def test_uniform_budgets_leave_sliding_windows_alone():
    own = make_budgets(n_layer=2, n_head_kv=2)
    own.head_config[1] = -2
    for keep in (0.25, None):
        budgets = cases.uniform(SHAPE, keep, own)
        budgets.check()
        assert (budgets.head_config[1] == -2).all() and (budgets.head_config[0] != -2).all()
        assert (measure.next_compaction(budgets, 0) is None) == (keep is None)


def test_resolve(tmp_path):
    plain, embedded = write_gguf(tmp_path / "plain.gguf"), write_gguf(tmp_path / "embedded.gguf")
    gguf_file.embed_budgets(embedded, embedded, make_budgets())
    with pytest.raises(TcaError, match="carries no enabled budgets"):
        cases.resolve(plain, ("0.25", "file"))
    found = cases.resolve(plain, ("0.25", "dense"))
    assert (found["dense"].head_config == -1).all() and (found["0.25"].head_config == 0).all()
    found = cases.resolve(embedded, ("file", "0.5"))
    assert np.array_equal(found["file"].head_config, make_budgets().head_config)
    assert found["0.5"].group_size == found["file"].group_size


def test_next_compaction():
    budgets = cases.uniform(SHAPE, 0.39)
    assert [measure.next_compaction(budgets, n) for n in (0, 1023, 1024, 1500, 1536)] == [1024, 1024, 1536, 1536, 2048]
    assert measure.next_compaction(cases.uniform(SHAPE, None), 5000) is None


# ---- the order of measurements ---------------------------------------------------------------------------------------


class FakeProfile:
    def learn(self): ...
    def off(self): ...
    def start(self): ...
    def read(self):
        return native.PassSeconds(0.5, 0.1, 0.1, 0.3)


class FakeRunner:
    """A context whose micro-batches take a second for every 512 tokens in the cache (half of it for TCA) plus one."""

    log: list[tuple[str, str, int]] = []
    interrupt_at = 0

    def __init__(self, model, case, budgets, n_ctx, n_threads):
        self.case, self.budgets, self.n_ctx = case, budgets, n_ctx
        self.profile, self.seconds, self.depth, self.held, self.kept = FakeProfile(), 0.0, 0, 0, -1

    def feed(self, tokens, step):
        seconds = []
        for at in range(0, len(tokens), step):
            n = len(tokens[at : at + step])
            assert self.held + n <= self.n_ctx
            seconds.append((1 + self.held / 512 * (1 if self.budgets is None else 0.5)) * n / 512)
            self.held += n
        self.log.append((self.case.label, "feed", len(tokens)))
        return seconds

    def warm_up(self, tokens): ...

    def restart(self):
        self.seconds, self.depth, self.held = 0.0, 0, 0

    def extend(self, tokens):
        assert self.held == self.depth, "measurements are taken back before the filling goes on"
        if self.interrupt_at and len(tokens) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.log.append((self.case.label, "extend", len(tokens)))
        self.seconds += sum(self.feed(tokens[self.depth :], 512))
        self.depth = len(tokens)

    def keep(self):
        self.kept = self.depth

    def rewind(self):
        assert self.kept == self.depth
        self.held = self.depth

    def visible(self):
        return [self.held] * 4

    def close(self):
        self.log.append((self.case.label, "close", 0))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    from tca_gguf import llama, logs
    from tca_gguf.calib import runtime

    class FakeModel:
        n_vocab = 1000

        def __init__(self, path, n_gpu_layers): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

    monkeypatch.setattr(runtime, "Model", FakeModel)
    monkeypatch.setattr(measure, "Runner", FakeRunner)
    monkeypatch.setattr(llama, "load", lambda: None)
    monkeypatch.setattr(logs, "take_over", lambda *_: None)
    speeds = iter([(40e9, 400e9), (20e9, 500e9), (30e9, 450e9)] * 9)
    monkeypatch.setattr(native, "machine_limits", lambda n_threads: next(speeds))
    monkeypatch.setattr(FakeRunner, "log", [])
    monkeypatch.setattr(FakeRunner, "interrupt_at", 0)
    path = write_gguf(tmp_path / "m.gguf")
    gguf_file.embed_budgets(path, path, make_budgets())
    return path


def test_contexts_are_filled_once_and_whole_prompts_come_with_it(fake):
    told = []
    settings = Settings((2048, 512, 1024), tests=("prefill", "decode", "whole"), repeat=2, n_gen=4, budgets=("0.39", "dense"))
    result = bench.run(fake, settings, lambda text: None, lambda r: told.append(len(r.rows)))
    assert [(depth) for label, what, depth in FakeRunner.log if what == "extend" and label == "fa=0 f16"] == [512, 1024, 2048]
    assert told == [6, 12, 18] and not result.interrupted
    # at the start and at each depth
    assert result.hardware["read_gbps_all"] == [40, 20, 30, 40] and result.hardware["read_gbps"] == 35 and result.hardware["fma_gflops"] == 425
    assert [(r.depth, r.test, r.budgets) for r in result.rows] == [
        (d, t, b) for d in (512, 1024, 2048) for t in ("prefill", "decode", "whole") for b in ("0.39", "dense")
    ]
    whole = {(s.config, s.depth): s.tps for s in result.samples if s.test == "whole" and s.budgets in (None, "0.39")}
    assert whole["fa=0", 2048] == [2048 / (1 + 2 + 3 + 4)] and whole["tca", 1024] == [1024 / (1 + 1.5)]
    decode = next(s for s in result.samples if s.test == "decode" and s.config == "tca")
    assert len(decode.tps) == 2 and len(decode.token_ms) == 8 and decode.attention.select_share == pytest.approx(0.1)
    # one compaction for the budgets that forget, none for the dense ones
    assert [(s["budgets"], s["tokens"], len(s["token_ms"])) for s in result.stalls] == [("0.39", measure.next_compaction(cases.uniform(SHAPE, 0.39), 2048), 31)]
    assert sorted(label for label, what, _ in FakeRunner.log if what == "close") == ["fa=0 f16", "fa=1 f16", "tca f16, dense budgets", "tca f16, keep 0.39"]


def test_passes_repeat_the_whole_prompt_alone(fake):
    told = []
    settings = Settings((512, 1024), tests=("whole", "decode"), repeat=1, n_gen=2, passes=3)
    result = bench.run(fake, settings, lambda text: None, lambda r: told.append([(row.depth, row.test) for row in r.rows]))
    assert all(len(s.tps) == (3 if s.test == "whole" else 1) for s in result.samples)
    # whoever prints the rows that were added sees each once, complete
    assert told == [[(512, "decode"), (512, "whole")], [(512, "decode"), (512, "whole"), (1024, "decode"), (1024, "whole")]]


def test_an_interrupt_keeps_the_finished_depths(fake):
    FakeRunner.interrupt_at = 2048
    result = bench.run(fake, Settings((512, 1024, 2048), repeat=1, n_gen=2), lambda text: None)
    assert result.interrupted and {r.depth for r in result.rows} == {512, 1024} and result.as_json()["interrupted"]
    assert sum(what == "close" for _, what, _ in FakeRunner.log) == 3


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_series_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    samples = [sample("decode", d, c, [1.0 * d, 3.0 * d], b, k) for d in (2048, 512) for c, b, k in (
        ("tca", "file", "f16"), ("fa=0", None, "f16"), ("fa=1", None, "f16"), ("tca", "file", "q8_0"), ("tca", "0.25", "f16"))]  # fmt: skip
    machine = {"cpu": "Test", "threads": 2}
    raw = bench.Result(machine, {"model": "m.gguf"}, [], samples).as_json()
    lines = plot.series([raw])["decode"]
    assert list(lines) == ["stock, flash attention off", "stock, flash attention on", "TCA f16", "TCA f16, keep 0.25", "TCA q8_0"]
    assert lines["TCA f16"] == [(512, 1024.0), (2048, 4096.0)]
    assert plot.series([raw, raw])["decode"] == lines
    saved = tmp_path / "raw.json"
    saved.write_text(json.dumps(raw))
    from click.testing import CliRunner

    done = CliRunner().invoke(plot.main, [str(saved), "-o", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for text, message in (("{}", "no result of bench"), ("x", "not JSON")):
        saved.write_text(text)
        done = CliRunner().invoke(plot.main, [str(saved), "-o", str(tmp_path / "p.png")])
        assert done.exit_code == 1 and message in done.output
    with pytest.raises(TcaError, match="nothing to plot"):
        plot.plot([raw | {"samples": []}], tmp_path / "q.png")


def test_tables(tmp_path):
    samples = []
    for depth in (1024, 2048):
        samples += [
            sample("decode", depth, "fa=0", [10.0], attention=Attention(50.0, 1e8, 1e9)),
            sample("decode", depth, "fa=1", [8.0, 9.0], attention=Attention(60.0, 1e8, 1e9)),
            sample("decode", depth, "tca", [2e4 / depth], "file", attention=Attention(5.0, 4e7, 4e8, 0.012)),
            sample("whole", depth, "fa=0", [100.0]), sample("whole", depth, "tca", [150.0], "file"),
        ]  # fmt: skip
    machine = {"cpu": "Test", "threads": 2, "read_gbps": 16.0, "fma_gflops": 400.0, "build": {"simd": "avx2"}}
    stalls = [{"kv_type": "f16", "budgets": "0.25", "tokens": 2560, "median_ms": 20.0, "longest_ms": 30.0, "ratio": 1.5}]
    raw = tmp_path / "part.json"
    raw.write_text(json.dumps(bench.Result(machine, {"model": "m.gguf"}, results.rows_of(samples), samples, stalls).as_json()))
    from click.testing import CliRunner

    from tca_gguf.bench.tables import main

    text = CliRunner().invoke(main, [str(raw)]).output
    assert "### part\nm.gguf, Test, 2 threads, avx2; measured limits 16.0 GB/s, 400 GFLOP/s; largest spread of one series 12%" in text
    assert "| decode | 1,024 | 10.0 | 8.5 | 19.5 | 1.95x |" in text and "| whole | 2,048 | 100.0 |  | 150.0 | 1.50x |" in text
    assert "| decode | 1,024 | TCA f16 | 5.000 | 40.0 | 8.0 GB/s | 50% | 1.2% |" in text
    assert "| decode | f16 | file | " in text and "| f16 | keep 0.25 | 2,560 | 20.0 | 30.0 | 1.50 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| decode") and "GB/s" in line}
    assert widths == {9}
