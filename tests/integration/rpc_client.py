"""A client of RPC servers, in a process of its own: devices that are registered stay so. Prints lines of JSON.

rpc_client.py MODEL SERVERS run|prefill|decode    SERVERS: host:port,... or "-" for none
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import numpy as np

from runtime_context import F16, Context, LoadError


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main(model: str, servers: str, mode: str) -> int:
    if servers != "-":
        from tca_gguf.remote import add_servers

        add_servers(servers)
    try:
        context = Context(model, n_ctx=8192 if mode != "run" else 1024, type_k=F16, type_v=F16)
    except LoadError as error:
        say(refused=str(error))
        return 0
    ids = [1, *map(int, np.random.default_rng(7).permutation(np.arange(500, 40000))[:7999])]
    with context:
        if mode == "run":
            tokens = context.greedy(ids[:400], 64)
            kept = [p.tolist() for p in context.positions()]
            saved = context.save(0)
            then = context.greedy([5], 4)
            context.rm(0, -1, -1)
            loaded = context.load(saved, 0)
            again = context.greedy([5], 4)
            say(tokens=tokens, kept=kept, then=then, again=again, loaded=loaded == len(saved), state=hashlib.sha256(saved).hexdigest(),
                log=[line for line in context.lines if "tca:" in line])  # fmt: skip
            return 0
        position, status = 0, 0
        if mode == "decode":
            context.feed(ids[:300])
            position = 300
        while position < len(ids):
            n = 1 if mode == "decode" else 500
            say(position=position)
            start = time.monotonic()
            status = context.batch([(t, position + i, [0], i == n - 1) for i, t in enumerate(ids[position : position + n])])
            if status != 0:
                say(status=status, seconds=time.monotonic() - start, log=[line for line in context.lines if "tca:" in line or "gone" in line])
                break
            position += n
    say(closed=True, status=status)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
