"""A small seeded slice of the evaluation on SmolLM2-135M-Instruct, with expectations that hold on every machine.

The text is the generated records, which no Python version changes. Rounding differs between CPUs: where one answer may tip over,
the expectation leaves room for it, and the exact parts (what is asked, what is evicted, what is reused) are exact.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from runtime_context import write_model

from tca_gguf import gguf_file, llama, logs, native
from tca_gguf.calib.runtime import Model, Session
from tca_gguf.calib.stream import Layout
from tca_gguf.cli import cli
from tca_gguf.errors import TcaError
from tca_gguf.eval import SUITES, Settings, run
from tca_gguf.eval.policies import uniform_budgets, uniform_config
from tca_gguf.eval.suites.base import TextSuite
from tca_gguf.eval.suites.turns import reuse
from tca_gguf.eval.texts import records, text_size

pytestmark = pytest.mark.slow
RECORDS = {"text": "records", "uniform": 0.9}
GONE = 512 - int(uniform_config(0.9, Layout()) @ [1, 2, 4, 8, 16])  # tokens that a head loses of a group


@pytest.fixture(scope="module")
def six_layers(smollm2, tmp_path_factory):
    """Says nothing sensible, but quickly."""
    return write_model(smollm2, tmp_path_factory.mktemp("eval") / "six.gguf", layers=6, tokenizer=True)


@pytest.fixture(scope="module")
def two_layers(smollm2, tmp_path_factory):
    return write_model(smollm2, tmp_path_factory.mktemp("eval") / "two.gguf", layers=2, tokenizer=True)


def test_needle_and_turns(smollm2):
    result = run(smollm2, Settings(("needle", "turns"), (1536,), samples=8, **RECORDS))
    needle, turns = result.rows
    assert (needle["suite"], needle["policy"], needle["samples"], needle["answers"]) == ("needle", "key-diff", 8, 8)
    # 1,280 tokens, one group of 512 compacted in every head
    assert needle["keep"] == round(1 - GONE / 512, 4) and needle["cache_tokens"] == 1280 and needle["evicted_tokens"] == GONE
    assert needle["dense"] >= 0.75 and needle["kept_correct"] >= needle["dense_correct"] - 3
    # nearly everything is kept here, and 64 slots a head are there for what is taken back over a compaction
    assert needle["kv_bytes"] < 1.03 * needle["kv_bytes_dense"] and needle["kv_bytes_dense"] == 1536 * 30 * 3 * 64 * 2 * 2
    assert all(0 < a["depth"] < 0.42 for a in result.answers if a["suite"] == "needle")

    assert turns["samples"] == 10 and turns["kept_correct"] >= turns["dense_correct"] - 3
    said = [a for a in result.answers if a["suite"] == "turns"]
    assert [a["turn"] for a in said] == (["next"] * 8 + ["edited", "changed"]) * 2
    dense, tca = said[:10], said[10:]
    # the edited turn keeps all before it, the changed fact what dense keeps or, over more than one compaction, nothing
    assert turns["edited_reused"] == [tca[8]["reused"]] and tca[8]["reused"] > 1280
    assert 0 < dense[9]["reused"] < 300 and turns["changed_reused"] in ([0], [dense[9]["reused"]])
    assert tca[9]["expected"] != tca[0]["expected"] and tca[0]["expected"][0] not in tca[9]["text"]


def test_kld(smollm2):
    result = run(smollm2, Settings(("kld",), (1536, 1280), ("key-diff", "dense-q8_0"), samples=64, **RECORDS))
    assert [(r["length"], r["policy"], r["samples"]) for r in result.rows] == [
        (1536, "key-diff", 64), (1536, "dense-q8_0", 64), (1280, "key-diff", 64), (1280, "dense-q8_0", 64)
    ]  # fmt: skip
    for row in result.rows:
        evicts = row["policy"] == "key-diff"
        assert 0 < row["mean_kl"] < (0.05 if evicts else 0.1) and row["kl_99"] >= row["mean_kl"] and 0.85 <= row["top1"] <= 1
        assert row["mean_kl_uniform"] == (row["mean_kl"] if evicts else None)
        assert abs(np.log(row["ppl_tca"] / row["ppl_dense"])) < 0.1
        assert row["evicted_tokens"] == (GONE * (2 if row["length"] == 1536 else 1) if evicts else 0)


def test_streaming_llm_holds_the_first_and_the_newest_tokens(two_layers):
    """At the bytes of uniform budgets."""
    from tca_gguf.eval.policies import make_policies

    names = ("key-diff@0.15", "streaming-llm@0.15")
    rows = run(two_layers, Settings(("needle", "kld", "turns"), (1536, 1280), names, samples=1, text="records")).rows
    for uniform, streaming in zip(rows[::2], rows[1::2], strict=True):
        assert (uniform["policy"], streaming["policy"], uniform["keep"]) == ("key-diff", "streaming-llm", streaming["keep"])
        if uniform["suite"] != "kld" or uniform["length"] == 1536:  # kld's other policies read all lengths in one cache
            assert streaming["kv_bytes"] == pytest.approx(uniform["kv_bytes"], rel=0.02)
        assert streaming["evicted_tokens"] > 0
    assert len(rows) == 2 * 3 * 2

    logs.take_over(llama.load().llama_cpp)
    shape, ids = gguf_file.model_shape(two_layers), [1, *range(1000, 2599)]
    policy = make_policies(["streaming-llm@0.15"], (), "f16", shape, None, None)[0].at(2048, 1536)
    with Model(two_layers) as model:
        model.set_budgets(policy.budgets)
        with Session(model, 2048, n_ubatch=300) as session:  # micro-batches that do not match the groups
            session.decode(ids)
            held = native.plan_length(policy.budgets, 0, 0, len(ids))
            newest = list(range(len(ids) - held + 16, len(ids)))
            assert all(native.positions(session.address, layer, 0, head).tolist() == [*range(16), *newest] for layer in (0, 1) for head in range(3))


def test_the_dense_model_does_not_differ_from_itself(smollm2, tmp_path):
    """All heads dense in the ragged cache: what is left is the rounding of two attention kernels, which quantized weights would
    amplify."""
    path = write_model(smollm2, tmp_path / "f32.gguf", layers=4, f32=True, tokenizer=True)
    row = run(path, Settings(("kld",), (1280,), samples=32, text="records", uniform=1.0)).rows[0]
    assert (row["policy"], row["keep"], row["evicted_tokens"]) == ("key-diff", 1.0, 0.0)
    assert row["mean_kl"] < 1e-4 and row["top1"] >= 0.95


def test_reasoning_evicts_while_it_decodes(six_layers):
    result = run(six_layers, Settings(("reasoning",), (1280,), samples=1, **RECORDS))
    row, answer = result.rows[0], result.answers[1]
    assert row["answers"] == len(answer["right"]) == len(answer["moves"]) - 3 > 30
    assert answer["prompt_tokens"] < Layout().first_evicting < answer["prompt_tokens"] + answer["generated_tokens"]
    assert row["evicted_tokens"] == row["evicted_decoding"] == GONE


def test_every_suite_makes_its_texts_with_a_real_tokenizer(smollm2):
    logs.take_over(llama.load().llama_cpp)
    import random

    size = text_size(4096, Layout())
    with Model(smollm2) as model:
        for suite in SUITES.values():
            if isinstance(suite, TextSuite):
                document = suite.document(model.tokenize, size, records(), random.Random(0))
                assert 0.97 * size.n_tokens <= len(document.tokens) <= size.n_tokens
                text = model.text(document.tokens[: size.evicted])
                assert all(answer in text for question in document.questions for answer in question.expected)


def test_budgets_of_a_loaded_model(six_layers):
    """One model, three caches side by side; a context keeps the cache that it was made with."""
    logs.take_over(llama.load().llama_cpp)
    shape = gguf_file.model_shape(six_layers)
    budgets = [uniform_budgets(shape, "key-diff", keep, Layout()) for keep in (0.39, 0.25)]
    ids = [1, *range(1000, 2199)]
    with Model(six_layers) as model:
        sessions = []
        for choice in (None, *budgets):
            model.set_budgets(choice)
            sessions.append(Session(model, 1536))
        model.set_budgets(None)
        for session in sessions:
            session.decode(ids)
        assert [native.context_info(s.address).active for s in sessions] == [False, True, True]
        for session, choice in zip(sessions[1:], budgets, strict=True):
            assert native.region_length(session.address, 0, 0, 0) == 1200 - 512 + native.kept_per_group(choice, 0)
        with pytest.raises(TcaError, match="head_config is 1 x 3, this model has 6 layers"):
            model.set_budgets(uniform_budgets(gguf_file.ModelShape("llama", "", 1, 3, 3, 64, 64, 8192), "key-diff", 0.5, Layout()))
        for session in sessions:
            session.close()
        with Session(model, 512) as session:
            assert not native.context_info(session.address).active


def test_a_cache_is_not_taken_back_into_what_it_compacted(six_layers):
    logs.take_over(llama.load().llama_cpp)
    from tca_gguf.eval.policies import DENSE, Policy

    policy = Policy("key-diff", "f16", uniform_budgets(gguf_file.model_shape(six_layers), "key-diff", 0.39, Layout()))
    ids = [1, *range(1000, 2199)]
    with Model(six_layers) as model:
        model.set_budgets(policy.budgets)
        with Session(model, 1536) as session:
            session.decode(ids)
            assert reuse(session, ids, ids + [5], policy) == 1200 == session.length()
            assert reuse(session, ids, ids[:1100] + [5], policy) == 1100 == session.length()
            assert reuse(session, ids[:1100], ids[:300] + [5], policy) == 300 == session.length()  # over the only compaction
            session.clear()
            session.decode([*ids, *range(3000, 3336)])  # 1,536 tokens, compacted twice
            assert reuse(session, [*ids, *range(3000, 3336)], ids[:300] + [5], policy) == 0 == session.length()
        model.set_budgets(None)
        with Session(model, 1536) as session:
            session.decode(ids)
            assert reuse(session, ids, ids[:300] + [5], DENSE) == 300 == session.length()


def test_what_fails_does_not_take_the_rest_with_it(two_layers, tmp_path, monkeypatch):
    """In 1,280 tokens streaming-llm@0.9 evicts nothing before the question; the policies and suites behind it still have rows."""
    raw = tmp_path / "raw.json"

    def broken(lab, samples):
        raise TcaError("no list")
        yield

    monkeypatch.setattr(SUITES["common-words"], "run", broken)
    result = CliRunner().invoke(cli, ["eval", str(two_layers), "--suite", "needle,common-words,kld", "--lengths", "1536", "--samples", "1",
                                      "--policy", "streaming-llm@0.9,key-diff@0.9", "--text", "records", "--save", str(raw), "--json"])  # fmt: skip
    info = json.loads(result.stdout)
    assert [(r["suite"], r["policy"]) for r in info["rows"]] == [("needle", "key-diff"), ("kld", "streaming-llm"), ("kld", "key-diff")]
    assert [e.partition(": ")[0] for e in info["errors"]] == ["needle 1536 streaming-llm", "common-words"]
    assert "evicted nothing in 1280 tokens" in info["errors"][0] and info["errors"][1].endswith("no list")
    assert json.loads(raw.read_text()) == info and result.exit_code != 0
    with pytest.raises(TcaError, match="needle 1536 streaming-llm: .*evicted nothing"):
        run(two_layers, Settings(("needle",), (1536,), ("streaming-llm@0.9",), samples=1, text="records"))


def test_the_command(smollm2):
    result = CliRunner().invoke(cli, ["eval", str(smollm2), "--suite", "needle", "--lengths", "1280", "--samples", "2", "--uniform", "0.9",
                                      "--text", "records", "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    assert [row["samples"] for row in info["rows"]] == [2] and len(info["answers"]) == 4
    assert info["settings"]["model"] == smollm2.name and info["hardware"]["build"]["upstream"]
