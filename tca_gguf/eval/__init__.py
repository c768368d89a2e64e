"""Evaluation: what a cache policy costs in answers, against the dense model on the same prompts.

texts, questions   the text, facts in it, what is asked and how an answer counts
policies           which tokens stay: budgets and metric, or a quantized stock cache, by name
lab                the model, its contexts and the progress of one run
suites/            one file a suite, and their registry
stats              confidence intervals
run, plot          a whole evaluation, its JSON and its picture

A suite is judged by *kept*: of what the dense model answers, the share that the policy still answers.
"""

from __future__ import annotations

from .lab import Settings
from .run import Result, run
from .suites import SUITES

__all__ = ["SUITES", "Result", "Settings", "run"]
