"""Policies by name, and what the command makes of its options."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_samples import N_HEAD_KV, N_LAYER, make_budgets, same_budgets, write_gguf

from tca_gguf import gguf_file, native
from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError
from tca_gguf.eval.lab import Settings
from tca_gguf.eval.policies import Policy, layout_of, make_policies, uniform_budgets, uniform_config
from tca_gguf.eval.run import policy_names
from tca_gguf.eval.streaming_llm import group_size, streaming_budgets
from tca_gguf.eval.suites.kld import runs_of
from tca_gguf.eval.texts import ROOM, text_size
from tca_gguf.gguf_file import ModelShape

SHAPE = ModelShape("llama", "m", N_LAYER, 4, N_HEAD_KV, 8, 8, 4096)


@pytest.mark.parametrize("keep", [0.0625, 0.1, 0.15, 0.25, 0.39, 0.5, 0.6, 0.9, 1.0])
def test_uniform_budgets_come_close_to_the_fraction(keep):
    budgets = uniform_budgets(SHAPE, "key-diff", keep, Layout())
    assert budgets.head_kept_fraction().std() == 0
    assert Policy("x", "f16", budgets).keep == pytest.approx(budgets.kept_fraction) == pytest.approx(keep, abs=0.017)
    assert np.asarray(budgets.configs).sum() == 32


def test_layers_that_slide_get_no_budget():
    budgets = uniform_budgets(SHAPE, "key-diff", 0.5, Layout(), [1])
    assert budgets.stored_layers() == [1] and Policy("x", "f16", budgets).keep == pytest.approx(budgets.kept_fraction)


def test_uniform_config_is_as_wide_as_the_prototypes():
    assert uniform_config(0.25, Layout()).tolist() == [9, 9, 7, 5, 2]  # 127 of 512 tokens, its 0.248


def test_policies_of_a_file():
    own = make_budgets()
    made = make_policies(["calibrated", "key-diff", "dense-q8_0"], (), "q8_0", SHAPE, own, None)
    assert [(p.name, p.kv_type, p.budgets is None) for p in made] == [("calibrated", "q8_0", False), ("key-diff", "q8_0", False), ("dense-q8_0", "q8_0", True)]
    assert made[0].budgets is own and made[2].keep == 1.0
    assert layout_of(made[1].budgets) == layout_of(own)
    # as near the file's own fraction as one configuration for all heads can come
    step = own.block_size / own.group_size
    assert abs(made[1].keep - made[0].keep) <= step


def test_every_policy_at_every_fraction_and_dense_once():
    calls = []

    def calibrate(metric, keep):
        calls.append((metric, keep))
        return make_budgets()

    made = make_policies(["calibrated", "calibrated:key-diff", "key-diff", "dense-q4_0"], (0.5, 0.25), "f16", SHAPE, None, calibrate)
    assert [p.name for p in made] == ["calibrated", "calibrated:key-diff", "key-diff"] * 2 + ["dense-q4_0"]
    assert calls == [("key-probe", 0.5), ("key-diff", 0.5), ("key-probe", 0.25), ("key-diff", 0.25)]


@pytest.mark.parametrize("keep", [0.15, 0.25, 0.39, 0.6])
@pytest.mark.parametrize("length", [4096, 5000, 8192, 16384, 32768])
def test_streaming_llm_takes_the_bytes_of_uniform_budgets(keep, length):
    uniform, streaming = make_policies(["key-diff", "streaming-llm"], (keep,), "f16", SHAPE, None, None)
    n_text, n_ctx = text_size(length, Layout()).n_tokens, -(-length // 256) * 256
    policy = streaming.at(length, n_text)
    policy.budgets.check()
    assert (policy.name, policy.keep) == ("streaming-llm", uniform.keep) and uniform.at(length, n_text) is uniform
    taken, dense = policy.budgets.kv_bytes(64, 64, n_ctx)
    assert taken == pytest.approx(uniform.budgets.kv_bytes(64, 64, n_ctx)[0], rel=0.02) and taken < dense

    # when questions begin it holds about as much as the others do, and then nothing is dropped until they are answered
    held = native.plan_length(policy.budgets, 0, 0, n_text)
    assert -64 <= held - native.plan_length(uniform.budgets, 0, 0, n_text) <= ROOM
    assert [native.plan_length(policy.budgets, 0, 0, n_text + i) for i in (1, ROOM - 1)] == [held + 1, held + ROOM - 1]
    # it forgets: what a group leaves behind is nothing
    assert native.kept_per_group(policy.budgets, 0) == 0 and (policy.budgets.head_config == 0).all()
    assert held == n_text - native.plan_groups(policy.budgets, n_text) * policy.budgets.group_size < n_text


@pytest.mark.parametrize("behind", [-300, -1, 0, 1, 255, 256, 257, 511, 512, 513, 1500, 27001])
def test_streaming_llm_drops_nothing_while_questions_are_asked(behind):
    slots = 1000
    group = group_size(slots, slots + behind)
    assert ROOM <= group <= 2 * ROOM
    dropped_at = [slots + i * group for i in range(200)]
    inside = [at for at in dropped_at if slots + behind < at < slots + behind + ROOM]
    assert not inside if behind >= 0 else group == ROOM  # nothing is evicted before such a text ends, which is an error


def test_streaming_llm_without_room_or_without_need():
    streaming = make_policies(["streaming-llm@1"], (), "f16", SHAPE, None, None)[0]
    assert streaming.at(4096).budgets is streaming.matched  # all heads dense
    small = uniform_budgets(SHAPE, "key-diff", 0.1, Layout(16, 64, 48, 4))
    with pytest.raises(TcaError, match="use a greater length"):
        streaming_budgets(small, 512)
    assert streaming_budgets(small, 4096).window > 100


def test_layers_that_slide_stay_so_under_streaming_llm():
    budgets = make_policies(["streaming-llm@0.25"], (), "f16", SHAPE, None, None, lambda: [1])[0].at(4096).budgets
    assert budgets.stored_layers() == [1]


def test_kld_reads_a_length_in_a_cache_of_its_own_where_budgets_depend_on_it():
    policies = make_policies(["key-diff", "streaming-llm", "dense-q8_0"], (0.25,), "f16", SHAPE, None, None)
    runs = runs_of(policies, (8192, 4096))
    assert [(r.index, r.lengths) for r in runs] == [(0, (8192, 4096)), (1, (8192,)), (1, (4096,)), (2, (8192, 4096))]
    assert runs[1].policy.budgets.window > runs[2].policy.budgets.window + 900  # a quarter of the length it is short of


@pytest.mark.parametrize(
    ("names", "keeps", "own", "text"),
    [
        (["calibrated"], (), None, "carries no budgets"),
        (["key-diff"], (), None, "carries no budgets"),
        (["no-metric"], (0.5,), None, "tca.metric"),
        (["key-diff@2"], (), "own", "above 0 and at most 1"),
        (["key-diff@x"], (), "own", "above 0 and at most 1"),
        (["none.gguf"], (), "own", "none.gguf does not exist"),
        (["calibrated:random"], (), "own", "needs --keep"),
    ],
)
def test_refused(names, keeps, own, text):
    with pytest.raises(TcaError, match=text):
        make_policies(names, keeps, "f16", SHAPE, make_budgets() if own else None, None)


def test_policies_with_a_fraction_of_their_own(tmp_path):
    path = write_gguf(tmp_path / "other.gguf")
    with pytest.raises(TcaError, match="carries no budgets"):
        make_policies([str(path)], (), "f16", SHAPE, None, None)
    gguf_file.embed_budgets(path, path, make_budgets(7))
    made = make_policies(["dense-q8_0", "key-diff@0.25", str(path), "key-diff"], (0.5, 0.4), "q8_0", SHAPE, None, None)
    assert [p.name for p in made] == ["key-diff", "key-diff", "key-diff", "other", "dense-q8_0"]
    assert [round(p.keep, 1) for p in made[:3]] == [0.5, 0.4, 0.2] and made[3].kv_type == "q8_0"
    assert same_budgets(made[3].budgets, make_budgets(7))
    with pytest.raises(TcaError, match="is another model"):
        make_policies([str(path)], (), "f16", ModelShape("llama", "m", 9, 4, 2, 8, 8, 4096), None, None)


def test_quantized_dense_needs_no_budgets():
    assert [p.name for p in make_policies(["dense-q8_0", "dense-q4_0"], (), "f16", SHAPE, None, None)] == ["dense-q8_0", "dense-q4_0"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), (("calibrated",), ())),
        (Settings(uniform=0.3), (("key-diff",), (0.3,))),
        (Settings(uniform=0.3, policies=("a", "b")), (("a", "b"), (0.3,))),
        (Settings(policies=("key-diff",)), (("key-diff",), ())),
        (Settings(keeps=(0.3, 0.2)), (("calibrated",), (0.3, 0.2))),
    ],
)
def test_what_the_options_mean(settings, expected):
    assert policy_names(settings) == expected


def test_options_that_exclude_each_other():
    with pytest.raises(TcaError, match="exclude each other"):
        policy_names(Settings(uniform=0.3, keeps=(0.3,)))
