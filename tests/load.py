"""llama-server under load: many clients over few slots, prompts that share and break prefixes, requests cancelled at random.

    python tests/load.py MODEL [--requests 200] [--clients 8] [--slots 4] [--dense] [--save FILE.json]

Not part of CI. Checked: the server lives to the end and no request is refused; every request that was not cancelled gets all the
tokens it asked for, one by one, and its prompt is counted whole; memory is flat over the second half. Exit code 1 if anything is
not so. Needs `openai` (pip install openai) beside tca_gguf.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "conversations"))

from measure import Server, text  # noqa: E402

GROWTH = 0.02  # of the server's memory from the third to the last quarter of the requests: what allocators keep


def prompts(rng: random.Random, n: int, longest: int) -> list[list[dict[str, str]]]:
    """Conversations of 100 to `longest` tokens about one of four documents: most go on or branch off, some share nothing."""
    documents = [text(f"load-{i}", longest * 3 // 2) for i in range(4)]
    found = []
    for i in range(n):
        document = documents[rng.randrange(4)]
        cut = document[: rng.randrange(200, len(document))]
        messages = [{"role": "system", "content": cut if rng.random() < 0.5 else document}]
        if rng.random() < 0.15:
            messages = [{"role": "system", "content": text(f"own-{i}", rng.randrange(200, longest * 3 // 2))}]
        for turn in range(rng.randrange(3)):
            messages += [{"role": "user", "content": f"Question {turn}."}, {"role": "assistant", "content": text(f"a{rng.randrange(3)}", 300)}]
        found.append([*messages, {"role": "user", "content": rng.choice(("Where is it?", "Which year?", text(f"q{i}", rng.randrange(20, 800))))}])
    return found


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rng = args, random.Random(args.seed)
        more = ["--cache-ram", "64", "--ctx-checkpoints", "8"]  # bounds that are reached soon, so that growth is a leak
        self.server = Server(args.model, args.dense, args.ctx, args.slots, args.threads, more=more)
        self.work: queue.Queue[tuple[int, list[dict[str, str]], int, int | None]] = queue.Queue()
        self.rows: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def memory(self) -> int:
        """Bytes of the server that are in memory, Linux."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10

    def ask(self, number: int, messages: list[dict[str, str]], n: int, cancel: int | None) -> dict[str, Any]:
        row: dict[str, Any] = {"request": number, "asked": n, "cancelled": False, "tokens": 0}
        stream = self.server.client.chat.completions.create(
            model="-", messages=messages, max_tokens=n, temperature=0.8, stream=True, stream_options={"include_usage": True},
            logprobs=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        for chunk in stream:
            for choice in chunk.choices:
                row["tokens"] += len(choice.logprobs.content or []) if choice.logprobs else 0
            if chunk.usage:
                row["usage"] = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens]
            timings = (chunk.model_extra or {}).get("timings")
            if timings:
                row["prompt"] = [timings["prompt_n"], timings["cache_n"]]
            if cancel is not None and row["tokens"] >= cancel:
                row["cancelled"] = True
                stream.close()
                break
        return row

    def client(self) -> None:
        while True:
            try:
                number, messages, n, cancel = self.work.get_nowait()
            except queue.Empty:
                return
            try:
                row = self.ask(number, messages, n, cancel)
            except Exception as error:
                row = {"request": number, "error": f"{type(error).__name__}: {error}"[:300]}
            with self.lock:
                row["memory"] = self.memory() if self.server.process.poll() is None else 0
                self.rows.append(row)
                if len(self.rows) % 20 == 0:
                    print(f"{len(self.rows)} requests, {row['memory'] / 2**20:.0f} MiB", flush=True)

    def warm_up(self) -> None:
        """Long prompts in all slots, so that every page of the cache was touched before memory is watched."""
        fill = int(self.args.ctx / self.args.slots * 0.8 * 2.8)  # characters
        talks = [[{"role": "user", "content": text(f"warm-{i}", fill)}] for i in range(self.args.slots)]
        threads = [threading.Thread(target=self.ask, args=(-1, talk, 64, None)) for talk in talks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run(self) -> list[str]:
        self.warm_up()
        for number, messages in enumerate(prompts(self.rng, self.args.requests, self.args.longest)):
            n = self.rng.choice((1, 8, 32, 64, 128))
            cancel = self.rng.randrange(n) if n > 1 and self.rng.random() < 0.25 else None
            self.work.put((number, messages, n, cancel))
        clients = [threading.Thread(target=self.client) for _ in range(self.args.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return self.complaints()

    def complaints(self) -> list[str]:
        found = []
        if (code := self.server.process.poll()) is not None:
            found.append(f"the server ended with {code}; its log: {self.server.log}")
        for row in self.rows:
            if "error" in row:
                found.append(f"request {row['request']}: {row['error']}")
            elif not row["cancelled"]:
                if row["tokens"] != row["asked"] or row["usage"][1] != row["asked"]:
                    found.append(f"request {row['request']}: {row['asked']} tokens asked, {row['tokens']} came, {row['usage'][1]} counted")
                if sum(row["prompt"]) != row["usage"][0]:
                    found.append(f"request {row['request']}: prompt of {row['usage'][0]} tokens, {row['prompt']} evaluated and kept")
        quarter = len(self.rows) // 4
        third, last = (max(row["memory"] for row in part) for part in (self.rows[2 * quarter : 3 * quarter], self.rows[3 * quarter :]))
        if last > third * (1 + GROWTH):
            found.append(f"memory grew from {third / 2**20:.0f} to {last / 2**20:.0f} MiB over the last half of the requests")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=16384, help="of all slots together")
    parser.add_argument("--longest", type=int, default=2500, help="tokens of the longest document, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    load, started = Load(args), time.time()
    try:
        found = load.run()
    finally:
        load.server.close()
    done = [row for row in load.rows if "error" not in row]
    kept = sum(row["prompt"][1] for row in done if "prompt" in row)
    evaluated = sum(row["prompt"][0] for row in done if "prompt" in row)
    print(f"{len(load.rows)} requests in {time.time() - started:.0f} s, {sum(row['cancelled'] for row in done)} cancelled; of their prompts "
          f"{evaluated} tokens evaluated and {kept} kept; {len(found)} complaints")  # fmt: skip
    for line in found:
        print(f"* {line}")
    if args.save:
        args.save.write_text(json.dumps({"complaints": found, "rows": load.rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
