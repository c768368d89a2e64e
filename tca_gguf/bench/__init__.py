"""Speed and memory of TCA against the stock cache, measured alternately in one process. How: measure.py.

    result = run("model.gguf", Settings(depths=(4096, 16384)), print)
    result.rows, result.as_json()
"""

from .cases import TESTS, Case, Settings, dense_configs
from .machine import hardware
from .measure import run
from .results import Attention, Result, Row, Sample

__all__ = ["TESTS", "Attention", "Case", "Result", "Row", "Sample", "Settings", "dense_configs", "hardware", "run"]
