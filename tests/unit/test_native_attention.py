"""Ragged attention over plain arrays against numpy in double precision, for every cache type and for awkward shapes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

from tca_gguf import native
from tca_gguf.errors import TcaError

TYPES = [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0]


def exact(q, k, v, scale, softcap=0.0, sinks=None):
    """q [t, h, dk], k and v one [n, d] a KV head -> [t, h, dv] in float64, and the same maths in float32.

    Sums run one after another (cumsum), as in a plain loop; numpy's own are pairwise and so more exact than any kernel.
    """

    def total(products, axis):
        return np.cumsum(products, axis=axis).take(-1, axis=axis)
    results = []
    for dtype in (np.float64, np.float32):
        t, h, _ = q.shape
        out = np.zeros((t, h, v[0].shape[1]), dtype)
        for head in range(h):
            kh, vh = k[head * len(k) // h].astype(dtype), v[head * len(k) // h].astype(dtype)
            for token in range(t):
                n = len(kh) - t + token + 1
                s = total(kh[:n] * q[token, head].astype(dtype), 1) * dtype(scale)
                if softcap:
                    s = dtype(softcap) * np.tanh(s / dtype(softcap))
                top = s.max() if sinks is None else max(s.max(), dtype(sinks[head]))
                p = np.exp(s - top)
                sink = 0 if sinks is None else np.exp(dtype(sinks[head]) - top)
                out[token, head] = total(p[:, None] * vh[:n], 0) / (total(p, 0) + sink)
        results.append(out)
    return results


def check(q, k, v, type_k, type_v, scale, softcap=0.0, n_threads=1, sinks=None):
    def stored(x, kind):
        raw = [quantize(np.ascontiguousarray(region, np.float32), kind) if len(region) else np.zeros((0, 1), np.uint8) for region in x]
        return raw, [dequantize(r, kind) if len(r) else np.zeros((0, x[0].shape[1])) for r in raw]

    raw_k, k_ = stored(k, type_k)
    raw_v, v_ = stored(v, type_v)
    lengths = [len(region) for region in k]
    want, low = exact(q.astype(np.float32), k_, v_, np.float32(scale), softcap, sinks)
    for impl in ("cpu", "reference"):
        out = native.attention(q, b"".join(r.tobytes() for r in raw_k), b"".join(r.tobytes() for r in raw_v), int(type_k), int(type_v), lengths,
                               q.shape[2], v[0].shape[1], scale, softcap, n_threads, impl, sinks)
        assert np.isfinite(out).all()
        error = np.abs(out - want)
        allowed = 2 * np.abs(low - want).max() + 1e-6 * np.abs(want).max()
        worst = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= allowed, f"{impl}: {out[worst]} is not {want[worst]} at token, head, value {worst}; allowed {allowed}"


def arrays(seed, t, gqa, lengths, dk, dv=None):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(t, gqa * len(lengths), dk))
    return q, [rng.normal(size=(n, dk)) for n in lengths], [rng.normal(size=(n, dv or dk)) for n in lengths]


@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_types_and_head_sizes(kind: T, dim: int) -> None:
    for seed, (t, gqa, lengths) in enumerate([(1, 7, [513, 1, 64]), (9, 8, [9, 600]), (20, 4, [63, 65])]):
        check(*arrays(seed, t, gqa, lengths, dim), kind, kind, dim**-0.5)


@pytest.mark.parametrize("kinds", [(T.F16, T.Q8_0), (T.Q8_0, T.F32), (T.Q4_0, T.BF16)], ids=lambda k: f"{k[0].name}-{k[1].name}")
def test_keys_and_values_of_different_types_and_sizes(kinds) -> None:
    check(*arrays(5, 3, 2, [70, 3, 520], 96, 64), *kinds, 0.1)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 40, 80, 100])
def test_head_sizes_off_every_vector_width(dim: int) -> None:
    check(*arrays(dim, 5, 3, [5, 77], dim), T.F16, T.F16, 1.0)
    check(*arrays(dim, 70, 1, [131], dim), T.F32, T.F32, 1.0)


@pytest.mark.parametrize("t", [1, 2, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("gqa", [1, 2, 7, 8])
def test_query_counts(t: int, gqa: int) -> None:
    check(*arrays(t * 10 + gqa, t, gqa, [t, t + 1, t + 130], 64), T.F16, T.F16, 0.125, n_threads=1 + t % 3)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 65, 511, 512, 513, 1024, 1500])
def test_lengths(past: int) -> None:
    check(*arrays(past, 1, 4, [past + 1, 1], 64), T.F16, T.F16, 0.125)
    check(*arrays(past, 17, 4, [past + 17, 17], 64), T.F16, T.F16, 0.125)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(softcap: float) -> None:
    check(*arrays(3, 4, 2, [300, 5], 64), T.F16, T.F16, 1.0, softcap)


def test_the_newest_token_is_visible_and_the_next_is_not() -> None:
    for t in (1, 4, 40):
        k = np.zeros((t + 5, 32), np.float32)
        v = np.repeat(np.arange(t + 5, dtype=np.float32)[:, None], 32, axis=1)
        out = native.attention(np.zeros((t, 1, 32)), [k], [v], 0, 0, [t + 5], 32, 32, 1.0)
        for token in range(t):  # equal scores: the mean of what is visible
            np.testing.assert_allclose(out[token, 0], np.mean(np.arange(6 + token)), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": [1]}, "k holds"),
        ({"n_threads": 0}, "positive"),
        ({"n_threads": -1}, "positive"),
        ({"softcap": 0.0, "q": np.zeros((5, 3, 32))}, "hold at least the n_tokens"),
        ({"q": np.zeros((2, 3, 16))}, "q has shape"),
    ],
)
def test_wrong_arguments(changes: dict, words: str) -> None:
    args = dict(q=np.zeros((2, 3, 32)), k=[np.zeros((4, 32), np.float32)], v=[np.zeros((4, 32), np.float32)], type_k=0, type_v=0,
                lengths=[4], head_dim_k=32, head_dim_v=32, scale=1.0)  # fmt: skip
    native.attention(**args)
    with pytest.raises(TcaError, match=words):
        native.attention(**{**args, **changes})


def test_heads_that_do_not_divide() -> None:
    region = [np.zeros((4, 32), np.float32)] * 2
    with pytest.raises(TcaError, match="multiple of n_head_kv"):
        native.attention(np.zeros((1, 3, 32)), region, region, 0, 0, [4, 4], 32, 32, 1.0)


@pytest.mark.parametrize("t", [1, 5, 70])
def test_attention_sinks(t):
    """Weak ones, strong ones and ones that take everything: in decode, in two passes over chunks, and in prefill."""
    q, k, v = arrays(21, t, 4, [1100, 83], 64)
    sinks = np.array([-1e4, -2, 0, 1, 3, 8, 40, 200], np.float32)
    check(q, k, v, T.F32, T.F32, 0.3, sinks=sinks)
    check(q, k, v, T.F16, T.F16, 0.3, softcap=20.0, n_threads=2, sinks=sinks)
    raw = b"".join(r.astype(np.float32).tobytes() for r in k), b"".join(r.astype(np.float32).tobytes() for r in v)
    everything = native.attention(q, *raw, 0, 0, [1100, 83], 64, 64, 0.3, sinks=np.full(8, 1e4, np.float32))
    assert (everything == 0).all()
    with pytest.raises(TcaError, match="sinks has shape"):
        native.attention(q, *raw, 0, 0, [1100, 83], 64, 64, 0.3, sinks=[0.0])
