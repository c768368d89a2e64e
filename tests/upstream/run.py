"""llama.cpp's own tests against our build: what passes with the stock cache must pass with budgets. Not part of CI.

    python tests/upstream/run.py server   [FILE...]  its server's tests (tools/server/tests), by pytest
    python tests/upstream/run.py examples [NAME...]  its example and test programs, compiled against our libraries

in the checkout, with the Python of the build (make dev). The tests and the programs come from the pinned sdist and are unpacked to
build/upstream/tests; nothing of them is copied into the repository. Every test runs twice, on the same weights: a file without
budgets and one with them; what differs is printed and the exit code says whether anything does.

--model FILE    a model without budgets, --budgets FILE the same with them. Without both: two layers of SmolLM2 with budgets of every
                kind and groups of 64 tokens, so that contexts of a few hundred tokens are compacted many times.
--save FILE     the outcomes as JSON.

The server's tests need their requirements (pytest, openai, requests, ...), which go into build/upstream/tests/venv; that needs pip
and a network once. Nothing else is downloaded: see server_model.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "native" / "scripts"), str(ROOT / "tests" / "integration")]

import upstream  # noqa: E402  - native/scripts/upstream.py
from softly import rewrite  # noqa: E402

WORK = ROOT / "build" / "upstream" / "tests"
LLAMA = WORK / "vendor" / "llama.cpp"
NEEDED = re.compile(r"vendor/llama\.cpp/(tools/server/tests|examples|tests)/.*|vendor/llama\.cpp/models/templates/.*")
# without a model, or about what the cache has no part in (images, LoRA, MCP servers, routers, the UI's proxy)
LEFT_OUT = {"test_lora", "test_mcp_servers", "test_proxy", "test_router", "test_security", "test_tools_builtin", "test_vision_api"}
PROMPT = "The meaning of life is"


def unpack() -> None:
    """The tests and examples of the pinned sdist, unchanged but for the assertions of the server's tests (softly.py)."""
    pin = upstream.read_pin(ROOT / "native" / "upstream.toml")
    stamp = WORK / "unpacked"
    wanted = pin.sha256 + hashlib.sha256((HERE / "softly.py").read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    sdist = upstream.find_sdist(pin, os.environ.get("TCA_SDIST"), ROOT / "build" / "upstream")
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]
            if member.isfile() and ".." not in parts and NEEDED.fullmatch("/".join(parts)):
                target = WORK.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    for path in (LLAMA / "tools/server/tests/unit").glob("test_*.py"):
        rewrite(path)
    stamp.write_text(wanted)


def small_models() -> tuple[Path, Path]:
    """Two layers of SmolLM2 with its tokenizer, without and with budgets."""
    from runtime_context import make_budgets, write_model
    from tca_gguf import gguf_file, models

    dense, tca = WORK / "small.gguf", WORK / "small-tca.gguf"
    if not tca.is_file():
        write_model(models.fetch("smollm2", models.cache_dir()), dense, layers=2, tokenizer=True)
        gguf_file.embed_budgets(dense, tca, make_budgets(dense))
    return dense, tca


# ---- the server's tests ----------------------------------------------------------------------------------------------


def test_python() -> Path:
    venv = WORK / "venv"
    python = venv / "bin" / "python"
    requirements = LLAMA / "tools/server/tests/requirements.txt"
    if not (venv / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)], check=True)
        (venv / "ready").touch()
    return python


def server_tests(model: Path, name: str, files: list[str], port: int, program: str) -> dict[str, dict]:
    folder = LLAMA / "tools/server/tests"
    results = WORK / f"server-{name}.jsonl"
    results.unlink(missing_ok=True)
    files = files or [f"unit/{path.name}" for path in sorted((folder / "unit").glob("test_*.py")) if path.stem not in LEFT_OUT]
    environment = os.environ | {
        "PORT": str(port), "PYTHONPATH": f"{folder}:{HERE}", "LLAMA_SERVER_BIN_PATH": program,
        "TCA_SERVER_MODEL": str(model), "TCA_SERVER_ARGS": "--threads 1", "TCA_RESULTS": str(results),
    }  # fmt: skip
    with open(WORK / f"server-{name}.log", "w") as log:
        subprocess.run([str(test_python()), "-m", "pytest", "-p", "server_model", "-m", "not slow", "-q", *files],
                       cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def differences(dense: dict[str, dict], tca: dict[str, dict]) -> list[str]:
    """What fails with budgets and not without, test by test. A failing line of both is the other model's text, not the cache."""
    found = []
    for test, one in dense.items():
        other = tca.get(test)
        if other is None:
            found.append(f"{test}: did not run with budgets")
            continue
        lines = [f"line {line}: {text}" for line, text in other["failed"].items() if line not in one["failed"]]
        if other["error"] and other["error"].partition(" ")[0] != one["error"].partition(" ")[0]:
            lines.append(other["error"])
        found += [f"{test}: {'; '.join(lines)}"] if lines else []
    return found


# ---- the examples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """source: relative to llama.cpp's root; args with MODEL for the model's path. text: the output of both must be the same."""

    source: str
    args: str
    text: bool = False


EXAMPLES = {
    "save-load-state": Example("tests/test-save-load-state.cpp", "-m MODEL"),
    "state-restore-fragmented": Example("tests/test-state-restore-fragmented.cpp", "-m MODEL"),
    "thread-safety": Example("tests/test-thread-safety.cpp", f"-m MODEL -ngl 0 -p '{PROMPT}' -n 64 -c 256 -ub 32 -np 4"),
    "parallel": Example("examples/parallel/parallel.cpp", "-m MODEL -np 4 -ns 8 -n 64 -c 2048 --temp 0"),
    "parallel-unified": Example("examples/parallel/parallel.cpp", "-m MODEL -np 4 -ns 8 -n 64 -c 2048 --temp 0 -kvu"),
    "parallel-shared": Example("examples/parallel/parallel.cpp", "-m MODEL -np 4 -ns 8 -n 64 -c 4096 --temp 0 -pps -kvu"),
    "batched": Example("examples/batched/batched.cpp", f"-m MODEL -p '{PROMPT}' -np 4 -n 48 -kvu"),
    "lookahead": Example("examples/lookahead/lookahead.cpp", f"-m MODEL -p '{PROMPT}' -n 64 --temp 0"),
    "lookup": Example("examples/lookup/lookup.cpp", f"-m MODEL -p '{PROMPT} the meaning of life is' -n 64 --temp 0 -c 2048 --spec-draft-n-max 3"),
    "speculative": Example("examples/speculative/speculative.cpp", f"-m MODEL -md MODEL -p '{PROMPT}' -n 64 --temp 0 -c 2048 --spec-draft-n-max 8"),
    "speculative-simple": Example("examples/speculative-simple/speculative-simple.cpp",
                                  f"-m MODEL -md MODEL -p '{PROMPT}' -n 64 --temp 0 -c 2048 --spec-draft-n-max 8 --spec-type draft-simple"),
    "passkey": Example("examples/passkey/passkey.cpp", "-m MODEL --junk 30 -c 2048"),
    "passkey-self-extend": Example("examples/passkey/passkey.cpp", "-m MODEL --junk 100 -c 1024 --grp-attn-n 4"),
    "simple": Example("examples/simple/simple.cpp", f"-m MODEL -n 32 '{PROMPT}'", text=True),
}  # fmt: skip


def compile_example(example: Example, library: Path) -> Path:
    """The program, compiled against the libraries of the build; again only if one of them is newer."""
    source, headers = LLAMA / example.source, ROOT / "build/upstream/source/vendor/llama.cpp"
    target = WORK / "bin" / source.stem
    newest = max(path.stat().st_mtime for path in (*library.glob("*.so*"), source))
    if target.is_file() and target.stat().st_mtime > newest:
        return target
    target.parent.mkdir(exist_ok=True)
    includes = [f"-I{headers / name}" for name in ("include", "ggml/include", "common", "vendor", "src")]
    libraries = [f"-l{name}" for name in ("llama-common", "llama", "ggml", "ggml-cpu", "ggml-base")]
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", "-O1", *includes, str(source), "-o", str(target), f"-L{library}", *libraries,
                    "-lpthread", f"-Wl,-rpath,{library}", f"-Wl,-rpath-link,{library}"], check=True)  # fmt: skip
    return target


def run_example(program: Path, example: Example, model: Path) -> dict[str, object]:
    args = [str(model) if part == "MODEL" else part for part in shlex.split(example.args)]
    environment = os.environ | {"LLAMACPP_TEST_MODELFILE": str(model), "LLAMA_ARG_THREADS": "1"}
    try:
        done = subprocess.run([str(program), *args], cwd=WORK, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
    except subprocess.TimeoutExpired:
        return {"code": "time out", "text": "", "log": ""}
    log = done.stderr.decode("utf-8", "replace")
    telling = [line for line in log.splitlines() if re.search(r"tca:.*(token|cannot|refus|need)|GGML_ASSERT|GGML_ABORT|failed", line)]
    return {"code": done.returncode, "text": done.stdout.decode("utf-8", "replace"), "log": " | ".join(telling[:3])[:500]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("server", "examples"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--budgets", type=Path)
    parser.add_argument("--port", type=int, default=18080, help="of the servers  [default: 18080]")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if (args.model is None) != (args.budgets is None):
        parser.error("give --model and --budgets, or neither")
    from tca_gguf.llama import lib_dir, program

    WORK.mkdir(parents=True, exist_ok=True)
    unpack()
    models = (args.model.resolve(), args.budgets.resolve()) if args.model else small_models()
    if args.what == "server":
        dense, tca = (server_tests(model, name, args.names, args.port, str(program("llama-server")))
                      for model, name in zip(models, ("dense", "tca"), strict=True))  # fmt: skip
        found = differences(dense, tca)
        passed = [sum(row["outcome"] == "passed" for row in rows.values()) for rows in (dense, tca)]
        print(f"{len(dense)} tests; without budgets {passed[0]} pass, with budgets {passed[1]}; {len(found)} fail with budgets only")
        outcomes: object = {"dense": dense, "tca": tca}
        if not dense:
            print(f"no test ran, see {WORK / 'server-dense.log'}")
            return 2
    else:
        outcomes, found = {}, []
        for name in args.names or EXAMPLES:
            example = EXAMPLES[name]
            binary = compile_example(example, lib_dir())
            one, other = (run_example(binary, example, model) for model in models)
            outcomes[name] = {"dense": one, "tca": other}  # type: ignore[index]
            same = one["code"] == other["code"] and (not example.text or one["text"] == other["text"])
            if not same:
                found.append(f"{name}: ends with {other['code']}, without budgets {one['code']}: {other['log']}")
            print(f"{name}: without budgets {one['code']}, with budgets {other['code']}, {'the same' if one['text'] == other['text'] else 'another'} text", flush=True)
    if args.save:
        args.save.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    for line in found:
        print(f"* {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
