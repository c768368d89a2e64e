"""llama-cpp-python's OpenAI-compatible server over the patched runtime: python -m tca_gguf.server --model model.gguf

Takes the arguments of `python -m llama_cpp.server`; needs the extra: pip install 'tca-gguf[server]'

Models are tca_gguf.Llama: what a client sends again is taken from the cache or from a checkpoint. TCA_CHECKPOINT_MIB bounds
the memory of the checkpoints (checkpoints.py). With --verbose a line on stderr says of every prompt what was kept.
"""

from __future__ import annotations

import runpy
import sys

from tca_gguf.errors import TcaError
from tca_gguf.checkpoints import default_limit
from tca_gguf.llama import llama_class, load


def main() -> None:
    try:
        default_limit()
        llama_cpp = load()
        llama_cpp.Llama = llama_class()  # type: ignore[attr-defined]  # the name by which the server makes models
        runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is missing, which the server needs; run: pip install 'tca-gguf[server]'")
    except TcaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
