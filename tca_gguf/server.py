"""llama-cpp-python's OpenAI-compatible server over the patched runtime: python -m tca_gguf.server --model model.gguf

Takes the arguments of `python -m llama_cpp.server`; needs the extra: pip install 'tca-gguf[server]'
"""

from __future__ import annotations

import runpy
import sys

from tca_gguf.errors import TcaError
from tca_gguf.llama import load


def main() -> None:
    try:
        load()
        runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is missing, which the server needs; run: pip install 'tca-gguf[server]'")
    except TcaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
