"""What a build computes, to hold two builds against each other: logits, greedy tokens, kept positions, and the saved state.

    A/.venv/bin/python native/scripts/same-as.py run MODEL a.json [--types f16,q8_0] [--tokens 3000]
    B/.venv/bin/python native/scripts/same-as.py run MODEL b.json
    python native/scripts/same-as.py compare a.json b.json

MODEL carries budgets. Everything is exact: sha256 of the logits' bytes at every prompt micro-batch and every greedy token, the tokens,
the positions of every slot of every region, and the state's bytes. Both runs must use the same number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run_case(path: str, type_name: str, n_tokens: int, n_greedy: int, n_threads: int) -> dict:
    import ctypes

    import numpy as np

    from tca_gguf import Llama, native

    types = {"f16": 1, "q8_0": 8, "q4_0": 2, "f32": 0}
    llm = Llama(
        path, n_ctx=n_tokens + n_greedy + 8, n_batch=512, n_ubatch=512, n_threads=n_threads, n_threads_batch=n_threads, logits_all=False,
        type_k=types[type_name], type_v=types[type_name], flash_attn=True, verbose=False, seed=1,
    )  # fmt: skip
    rng = random.Random(7)
    prompt = [rng.randrange(100, llm.n_vocab() - 100) for _ in range(n_tokens)]

    def logits() -> str:
        pointer = llm._ctx.get_logits()
        return digest(np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (llm.n_vocab(),)).tobytes())

    hashes, greedy = [], []
    step = 700  # not a multiple of anything
    for at in range(0, n_tokens, step):
        llm.eval(prompt[at : at + step])
        hashes.append(logits())
    for _ in range(n_greedy):
        token = int(llm.sample(temp=0.0))
        greedy.append(token)
        llm.eval([token])
        hashes.append(logits())
    ctx = ctypes.cast(llm.ctx, ctypes.c_void_p).value
    info = native.context_info(ctx)
    heads = [(layer, head) for layer in range(info.n_layer) for head in range(info.n_head_kv)]
    kept = {f"{layer}.{head}": digest(native.positions(ctx, layer, 0, head).tobytes()) for layer, head in heads}
    state = llm.save_state()
    return {"logits": hashes, "greedy": greedy, "kept": kept, "state": digest(bytes(state.llama_state)), "kv_bytes": info.kv_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("model")
    run.add_argument("out")
    run.add_argument("--types", default="f16,q8_0")
    run.add_argument("--tokens", type=int, default=3000)
    run.add_argument("--greedy", type=int, default=32)
    run.add_argument("--threads", type=int, default=2)
    compare = commands.add_parser("compare")
    compare.add_argument("a")
    compare.add_argument("b")
    args = parser.parse_args()
    if args.command == "run":
        result = {t: run_case(args.model, t, args.tokens, args.greedy, args.threads) for t in args.types.split(",")}
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)
        return 0
    with open(args.a) as a, open(args.b) as b:
        a, b = json.load(a), json.load(b)
    different = a.keys() ^ b.keys()
    for case in sorted(a.keys() & b.keys()):
        for what in a[case]:
            same = a[case][what] == b[case][what]
            n = len(a[case][what]) if isinstance(a[case][what], (list, dict)) else 1
            print(f"{case:6} {what:9} {n:5} {'same' if same else 'DIFFERENT'}")
            different |= set() if same else {case}
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
