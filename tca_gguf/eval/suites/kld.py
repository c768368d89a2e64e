"""kld: how far the next-token distribution moves from the dense model's on held-out text.

All policies read the same text side by side with the dense model, so that no logits are stored. Positions in the second half
of the window are scored, evenly spread: mean and 99% quantile of KL(dense || policy) in nats, top-1 agreement, perplexity of
both. Because nothing looks ahead, one pass over the longest window serves all lengths; a policy whose budgets depend on the
length has a cache for each. Uniform key-difference budgets at the
same kept fraction always run along: they are the yardstick, `mean_kl_uniform`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tca_gguf.calib.runtime import Session
from tca_gguf.calib.texts import spread
from tca_gguf.errors import TcaError

from ..lab import Lab
from ..policies import DENSE, UNIFORM_METRIC, Policy, layout_of, uniform_budgets
from ..stats import mean_interval
from ..texts import plain_tokens
from .base import Row


@dataclass
class Series:
    """What is known of each scored position, in order. kl: nats; agrees: the same most likely token; nll: of the text's token."""

    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)


@dataclass
class Run:
    """One cache. index: of its policy. lengths: the windows it is scored for; it reads the longest. caches: `Lab.cache` at each."""

    index: int
    policy: Policy
    lengths: tuple[int, ...]
    series: Series = field(default_factory=Series)
    caches: dict[int, dict[str, Any]] = field(default_factory=dict)


def runs_of(policies: Sequence[Policy], lengths: Sequence[int]) -> list[Run]:
    runs = []
    for i, policy in enumerate(policies):
        for served in [tuple(lengths)] if policy.matched is None else [(length,) for length in lengths]:
            runs.append(Run(i, policy.at(max(served)), served))
    return runs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, of one row of logits."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) in nats; what rounding takes below 0 is cut off, NaN stays NaN."""
    value = float(np.exp(log_p) @ (log_p - log_q))
    return 0.0 if value < 0 else value


class Kld:
    name = "kld"
    samples = 1024  # positions

    def cost(self, length: int, samples: int) -> int:
        return length

    def run(self, lab: Lab, samples: int) -> Iterator[Row]:
        lengths = lab.settings.lengths
        policies = list(lab.policies)
        yardstick: dict[int, int] = {}  # index of a policy -> index of the uniform one at its fraction
        for i, policy in enumerate(lab.policies):
            if policy.budgets is None:
                continue
            uniform = self.uniform(lab, policy)
            same = [j for j, p in enumerate(policies) if p.name == uniform.name and p.kv_type == uniform.kv_type and p.keep == uniform.keep]
            yardstick[i] = same[0] if same else len(policies)
            if not same:
                policies.append(uniform)
        scored = {length: spread(length // 2, length - 1, samples) for length in lengths}
        wanted = np.unique(np.concatenate(list(scored.values())))
        tokens = plain_tokens(lab.model.tokenize, max(lengths), lab.source, lab.rng(self.name))
        runs = runs_of(policies, lengths)
        dense = Series()
        started = time.monotonic()
        with ExitStack() as stack:
            per_batch = max(int(((wanted >= at) & (wanted < at + 512)).sum()) for at in range(0, max(lengths), 512))
            reference = stack.enter_context(lab.session(DENSE, max(lengths), n_outputs=max(1, per_batch)))
            sessions = [stack.enter_context(lab.session(run.policy, max(run.lengths), n_outputs=max(1, per_batch))) for run in runs]
            # batches end where a length ends, so that its cache can be looked at
            ends = sorted({*range(reference.n_batch, max(lengths), reference.n_batch), *lengths})
            for start, end in zip([0, *ends], ends, strict=False):
                at = wanted[(wanted >= start) & (wanted < end)]
                label = f"{self.name} {end} of {max(lengths)} tokens"

                def read(session: Session, series: Series, at: np.ndarray = at, start: int = start, end: int = end) -> list[np.ndarray]:
                    logits = session.decode_logits(tokens[start:end], (at - start).tolist())
                    log_p = [log_softmax(row) for row in logits]
                    series.nll += [-float(row[tokens[position + 1]]) for row, position in zip(log_p, at, strict=True)]
                    return log_p

                truth = read(reference, dense)
                lab.advance(end - start, label)
                for run, session in zip(runs, sessions, strict=True):
                    if end > max(run.lengths):
                        continue
                    pairs = list(zip(truth, read(session, run.series), strict=True))
                    run.series.kl += [kl_divergence(p, q) for p, q in pairs]
                    run.series.agrees += [bool(p.argmax() == q.argmax()) for p, q in pairs]
                    if end in run.lengths:
                        run.caches[end] = lab.cache(session, run.policy)
                    lab.advance(end - start, label)
        seconds = round(time.monotonic() - started, 1)

        for length in lengths:
            mine = np.isin(wanted, scored[length])
            served = {run.index: run for run in runs if length in run.lengths}

            def of(values: list, mine: np.ndarray = mine) -> np.ndarray:
                return np.asarray(values)[mine[: len(values)]]

            for i, policy in enumerate(lab.policies):
                run = served[i]
                kl, agrees = of(run.series.kl), of(run.series.agrees)
                if not np.isfinite(kl).all():
                    raise TcaError(f"kld: policy {policy.name} gave logits that are not finite")
                yield {
                    "suite": self.name,
                    "length": length,
                    "keep": round(policy.keep, 4),
                    "policy": policy.name,
                    "kv_type": policy.kv_type,
                    "samples": int(mine.sum()),
                    "dense": 1.0,
                    "tca": float(agrees.mean()),
                    "kept": float(agrees.mean()),
                    "mean_kl": float(kl.mean()),
                    "mean_kl_ci": mean_interval(kl),
                    "mean_kl_uniform": float(of(served[yardstick[i]].series.kl).mean()) if i in yardstick else None,
                    "kl_99": float(np.quantile(kl, 0.99)),
                    "top1": float(agrees.mean()),
                    "ppl_dense": float(np.exp(of(dense.nll).mean())),
                    "ppl_tca": float(np.exp(of(run.series.nll).mean())),
                    **run.caches[length],
                    "seconds": seconds,  # of the whole pass, all policies together
                }

    def uniform(self, lab: Lab, policy: Policy) -> Policy:
        assert policy.budgets is not None
        budgets = uniform_budgets(lab.shape, UNIFORM_METRIC, policy.keep, layout_of(policy.budgets), lab.full)
        return Policy(UNIFORM_METRIC, policy.kv_type, budgets)
