"""Policies by name, and what the command makes of its options."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_samples import N_HEAD_KV, N_LAYER, make_budgets, same_budgets, write_gguf

from tca_gguf import gguf_file
from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError
from tca_gguf.eval.lab import Settings
from tca_gguf.eval.policies import Policy, layout_of, make_policies, uniform_budgets, uniform_config
from tca_gguf.eval.run import policy_names
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
    assert calls == [("key-diff", 0.5)] * 2 + [("key-diff", 0.25)] * 2


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
