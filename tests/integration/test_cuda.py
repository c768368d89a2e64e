"""A real model on the GPU as on the CPU: SmolLM2-135M-Instruct, several groups evicted. Skipped where there is no GPU.

The weights are quantized, and the backends round activations differently: logits differ in the second digit, dense or not, and
greedy texts may part where two tokens are nearly equal. The ops are compared exactly in native/tests/test-cuda.cpp.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from runtime_context import F16, Q8_0
from tca_gguf import doctor, gguf_file, llama, logs, native
from tca_gguf.calib.runtime import Model, Session
from tca_gguf.calib.stream import Layout
from tca_gguf.eval.policies import uniform_budgets
from tca_gguf.eval.texts import plain_tokens, records

N_PROMPT, N_GREEDY, N_CTX = 3000, 64, 3584
KEEP = 0.39


@pytest.fixture(scope="module")
def on_cpu(smollm2) -> Iterator[Model]:
    if not any(device["gpu"] for device in doctor.devices()):  # llama_supports_gpu_offload() is true wherever RPC is built in
        pytest.skip("no GPU: this build has no GPU backend, or the machine no device")
    logs.take_over(llama.load())
    with Model(smollm2) as model:
        yield model


@pytest.fixture(scope="module")
def budgets(smollm2):
    return uniform_budgets(gguf_file.model_shape(smollm2), "key-diff", KEEP, Layout())


def greedy(model: Model, budgets, kv_type: int):
    """(tokens, logits after the prompt and before each token, kept positions [layer][head] after the prompt)."""
    model.set_budgets(budgets)
    with Session(model, N_CTX, type_k=kv_type, type_v=kv_type) as session:
        session.decode(plain_tokens(session.tokenize, N_PROMPT, records(), random.Random(1)))
        kept = [[native.positions(session.address, layer, 0, head) for head in range(session.n_head_kv)] for layer in range(session.n_layer)]
        tokens, logits = [], []
        for _ in range(N_GREEDY):
            logits.append(session.logits())
            tokens.append(int(logits[-1].argmax()))
            session.decode(tokens[-1:])
    return tokens, logits, kept


@pytest.mark.parametrize("layers", [-1, 12], ids=["all-layers", "12-layers"])
@pytest.mark.parametrize("kv_type", [F16, Q8_0], ids=["f16", "q8_0"])
def test_the_same_text(on_cpu, smollm2, budgets, kv_type, layers, capsys):
    tokens, logits, kept = greedy(on_cpu, budgets, kv_type)
    with Model(smollm2, n_gpu_layers=layers) as on_gpu:
        tokens_gpu, logits_gpu, kept_gpu = greedy(on_gpu, budgets, kv_type)

    overlap = [[len(np.intersect1d(a, b)) / len(a) for a, b in zip(x, y, strict=True)] for x, y in zip(kept, kept_gpu, strict=True)]
    assert all(len(a) == len(b) for x, y in zip(kept, kept_gpu, strict=True) for a, b in zip(x, y, strict=True))
    assert np.isfinite(logits_gpu).all()
    difference = np.abs(logits[0] - logits_gpu[0]).max()
    same = next((i for i, (a, b) in enumerate(zip(tokens, tokens_gpu, strict=True)) if a != b), N_GREEDY)
    gap = 0.0
    if same < N_GREEDY:  # what the CPU's logits say about the two tokens
        gap = float(logits[same][tokens[same]] - logits[same][tokens_gpu[same]])
    with capsys.disabled():
        print(f"\n       {same} of {N_GREEDY} greedy tokens the same, gap there {gap:.3f}; largest logit difference {difference:.3f}; "
              f"kept slots in common: layer 0 {np.mean(overlap[0]):.4f}, all {np.mean(overlap):.4f}, least {np.min(overlap):.4f}")  # fmt: skip
    assert np.mean(overlap[0]) > 0.99 and np.mean(overlap) > 0.9
    assert same == N_GREEDY or gap < 2 * np.abs(logits[same] - logits_gpu[same]).max()
    assert difference < 2.0


def test_a_state_comes_back(smollm2, on_cpu, budgets):
    with Model(smollm2, n_gpu_layers=-1) as model:
        model.set_budgets(budgets)
        with Session(model, N_CTX) as session:
            tokens = plain_tokens(session.tokenize, N_PROMPT, records(), random.Random(2))
            session.decode(tokens[:-1])
            state = session.save()
            session.decode(tokens[-1:])
            expected = session.logits()
            session.clear()
            session.restore(state)
            session.decode(tokens[-1:])
            assert np.array_equal(session.logits(), expected)
            assert session.remove_tail(N_PROMPT - 1)
            session.decode(tokens[-1:])
            assert np.array_equal(session.logits(), expected)
            assert not session.remove_tail(1000)  # compacted: it cannot go back there
