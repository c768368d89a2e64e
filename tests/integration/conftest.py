"""Models that the tests of the runtime share. Most use the first six layers of SmolLM2 with f32 weights: real keys and values,
seconds instead of minutes, and no rounding of quantized products that would hide or fake a difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_context import make_budgets, write_model
from tca_gguf import gguf_file, models
from tca_gguf.errors import TcaError

LAYERS = 6


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as it is."""
    try:
        return models.fetch("smollm2", models.cache_dir())
    except TcaError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def stock_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, f32, no budgets."""
    return write_model(smollm2, tmp_path_factory.mktemp("runtime") / "stock.gguf", layers=LAYERS, f32=True)


@pytest.fixture(scope="session")
def tca_model(stock_model: Path) -> Path:
    """The same with budgets of every kind."""
    path = stock_model.with_name("tca.gguf")
    gguf_file.embed_budgets(stock_model, path, make_budgets(stock_model))
    return path


@pytest.fixture(scope="session")
def dense_model(stock_model: Path) -> Path:
    """The same with every head dense."""
    path = stock_model.with_name("dense.gguf")
    gguf_file.embed_budgets(stock_model, path, make_budgets(stock_model, dense=True))
    return path


@pytest.fixture(scope="session")
def ids() -> list[int]:
    """500 token ids, no two alike: a token that repeats has the same key in the first layer, and which of them ranks higher
    there is decided by rounding, which differs from one micro-batch size to another."""
    return [1, *map(int, np.random.default_rng(7).permutation(np.arange(500, 40000))[:499])]
