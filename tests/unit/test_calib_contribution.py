"""Lengths behind the output projection, read from a GGUF file."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from tca_gguf.calib.contribution import equal_heads, output_grams
from tca_gguf.errors import TcaError

N_HEAD, DV, N_EMBD = 4, 16, 48


def write(path, weights, kind=GGMLQuantizationType.F32, expand=None):
    writer = GGUFWriter(path, "llama")
    if expand is not None:
        writer.add_tensor("blk.1.attn_v_b.weight", expand)
    writer.add_tensor("blk.1.attn_output.weight", quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_lengths_are_those_behind_the_projection(tmp_path, kind):
    kind = GGMLQuantizationType[kind]
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((N_EMBD, N_HEAD * DV)).astype(np.float32)
    grams = output_grams(write(tmp_path / "m.gguf", weights, kind))(1, N_HEAD, DV)
    stored = dequantize(quantize(weights, kind), kind)
    for head in range(N_HEAD):
        x = np.zeros(N_HEAD * DV)
        x[head * DV : (head + 1) * DV] = rng.standard_normal(DV)
        part = x[head * DV : (head + 1) * DV]
        assert part @ grams[head] @ part == pytest.approx(np.sum((stored @ x) ** 2), rel=1e-4)


def test_latent_values_are_expanded_first(tmp_path):
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((N_EMBD, N_HEAD * DV)).astype(np.float32)
    expand = rng.standard_normal((N_HEAD, DV, 24)).astype(np.float32)
    grams = output_grams(write(tmp_path / "m.gguf", weights, expand=expand))(1, N_HEAD, 24)
    for head in range(N_HEAD):
        x = rng.standard_normal(24)
        behind = weights[:, head * DV : (head + 1) * DV] @ (expand[head] @ x)
        assert x @ grams[head] @ x == pytest.approx(np.sum(behind**2), rel=1e-4)


def test_what_cannot_be_read_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", np.ones((N_EMBD, N_HEAD * DV), np.float32))
    with pytest.raises(TcaError, match=r"m\.gguf has no tensor blk\.0\.attn_output\.weight"):
        output_grams(path)(0, N_HEAD, DV)
    with pytest.raises(TcaError, match=r"is \(48, 64\), not \[n_embd, 3 heads of 16\]"):
        output_grams(path)(1, 3, DV)


def test_equal_heads_keep_every_length():
    x = np.random.default_rng(0).standard_normal(DV).astype(np.float32)
    for gram in equal_heads(0, N_HEAD, DV):
        assert x @ gram @ x == pytest.approx(x @ x)
