"""Calibration: measures what each attention head can spare and spends a cache budget accordingly.

texts, facts   the calibration text: prose, code, records, planted facts and later questions
runtime        a model and a context of the patched runtime
capture        one forward pass, each layer's Q, K, V looked at in the callback
stream         the runtime's streaming rule: which tokens a query sees
configs        the log-Gaussian family of configurations
probe          a vector a head that tells from a key how much its token will matter
contribution   what a head adds to its layer: lengths behind the output projection
evaluate       output error and dropped attention mass per head and configuration
allocate       one configuration a head at a target mean kept fraction
pipeline       all of it in order
"""

from __future__ import annotations

from .pipeline import DEFAULT_KEEP, DEFAULT_METRIC, DEFAULT_TOKENS, Measurement, calibrate, choose_budgets, measure

__all__ = ["DEFAULT_KEEP", "DEFAULT_METRIC", "DEFAULT_TOKENS", "Measurement", "calibrate", "choose_budgets", "measure"]
