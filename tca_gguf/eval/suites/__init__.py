"""The suites, by the names that the command takes. To add one: a file with a class of the form of `Suite`, and a line here."""

from __future__ import annotations

from .base import Suite
from .common_words import CommonWords
from .frequent_words import FrequentWords
from .kld import Kld
from .needle import Needle
from .needle_multikey import MultiKey
from .needle_multiquery import MultiQuery
from .needle_multivalue import MultiValue
from .reasoning import Reasoning
from .turns import Turns
from .variables import Variables

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (Needle(), MultiKey(), MultiValue(), MultiQuery(), Variables(), CommonWords(), FrequentWords(), Kld(), Turns(), Reasoning())
}  # fmt: skip
