#!/usr/bin/env bash
# langchain-community 0.4.2 over llama-cpp-python: how a prompt is evaluated.
#
# A good guess: ChatLlamaCpp and LlamaCpp pass llama-cpp-python's own default for n_batch, 512, on. Seen: both set 8, and llama-cpp-python
# then evaluates a prompt of 2,000 tokens in 250 calls of 8 (on two cores minutes where 512 takes seconds). n_batch=512 mends it.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check langchain-community==0.4.2
venv/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36 2>/dev/null ||
    { venv/bin/pip install --quiet --disable-pip-version-check scikit-build-core==0.12.2
      venv/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36; }
tar -xzf llama_cpp_python-0.3.36.tar.gz --wildcards '*/llama_cpp/llama.py' --strip-components=2

cat > run.py <<'PYTHON'
import ast
from pathlib import Path

from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp

init = next(node for node in ast.walk(ast.parse(Path("llama.py").read_text())) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
            and any(arg.arg == "n_batch" for arg in node.args.args + node.args.kwonlyargs))
own = {arg.arg: default for arg, default in zip(init.args.kwonlyargs, init.args.kw_defaults)}["n_batch"].value
chat, plain = (cls.model_fields["n_batch"].default for cls in (ChatLlamaCpp, LlamaCpp))
print(f"n_batch: llama-cpp-python {own}, ChatLlamaCpp {chat}, LlamaCpp {plain}")
assert (own, chat, plain) == (512, 8, 8), "the behaviour has changed"
PYTHON
venv/bin/python run.py
