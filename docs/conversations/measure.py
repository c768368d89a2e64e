"""What a client's next step costs: the tokens that are evaluated again when it stops, regenerates, edits, changes over.

    measure.py run MODEL --client server|llama [--dense] [--history N] [--rows ...] [--no-compare] --save FILE.json
    measure.py table FILE.json... > tables.md

`run` plays the rows below on one cache and writes a JSON object a row. The client is the openai library against our llama-server
(one slot; the row "two slots" starts it as everybody types it, without -np), or tca_gguf.Llama's chat completion in this process.
After every row the answer is compared bit by bit with that of a fresh context which is given the same tokens (a server started
for this, with cache_prompt false; a second Llama that is reset): 16 tokens at temperature 0 and, for each, the top 5 logprobs
as they come over HTTP or the whole row of logits.

Needs: tca_gguf, openai (for the client `server`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPARED = 16  # tokens of an answer that are compared
Messages = list[dict[str, str]]

WORDS = """harbour lantern granite ferry orchard bellows saddle copper thistle quarry mill beacon parish timber ledger anchor kiln meadow
chapel barley tunnel shepherd causeway glacier pigeon furnace violin almanac cellar heron""".split()


def text(seed: str, characters: int) -> str:
    """Plain sentences, the same for the same seed, no two alike."""
    rng, out = random.Random(seed), ""
    while len(out) < characters:
        a, b, c = rng.sample(WORDS, 3)
        out += f"In the year {rng.randrange(1400, 1990)} the {a} of the {b} had number {rng.randrange(100, 999)}, and the {c} stood beside it. "
    return out.strip()


def conversation(name: str, history: int, turns: int) -> Messages:
    """A document as system prompt (a quarter of the history), then turns of question and answer, then a question.

    history: tokens, about (3 characters each in these sentences).
    """
    budget = int(history * 3.0)
    messages = [{"role": "system", "content": "You answer from this document. " + text(name + "-document", budget // 4)}]
    each = (budget - budget // 4) // turns
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}. " + text(f"{name}-question-{turn}", each // 3)})
        messages.append({"role": "assistant", "content": text(f"{name}-answer-{turn}", each - each // 3)})
    return [*messages, {"role": "user", "content": "Now say in your own words what the document says about the harbour."}]


@dataclass
class Answer:
    prompt: int  # tokens
    evaluated: int  # of the prompt
    text: str
    bits: list[Any] = field(default_factory=list)  # one entry a compared token; equal entries are equal bits


# ---- two clients -----------------------------------------------------------------------------------------------------


class Server:
    """llama-server in a process of its own, asked through the openai library."""

    def __init__(self, model: str, dense: bool, n_ctx: int, slots: int | None = 1, threads: int = 2, more: Sequence[str] = ()) -> None:
        from openai import OpenAI

        from tca_gguf.llama import program

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args = [str(program("llama-server")), "-m", model, "-c", str(n_ctx), "-t", str(threads), "--port", str(port), "--host", "127.0.0.1", "-lv", "4", *more]
        args += ["-np", str(slots)] if slots else []
        args += ["--override-kv", "tca.enabled=bool:false"] if dense else []
        self.log = Path(tempfile.mkstemp(prefix="llama-server-", suffix=".log")[1])
        self.process = subprocess.Popen(args, stdout=self.log.open("w"), stderr=subprocess.STDOUT)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600, max_retries=0)
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(Exception):
                self.client.models.list(timeout=1)
                return
            time.sleep(0.1)
        raise SystemExit(f"llama-server does not start; its log: {self.log}")

    def ask(self, messages: Messages, n: int, *, stop_after: int | None = None, fresh: bool = False) -> Answer:
        compared = n <= COMPARED
        stream = self.client.chat.completions.create(
            model="-", messages=messages, max_tokens=n, temperature=0, stream=True, stream_options={"include_usage": True},
            logprobs=compared, top_logprobs=5 if compared else None, extra_body={"ignore_eos": True, "cache_prompt": not fresh},
        )  # fmt: skip
        answer, pieces, n_pieces = Answer(0, -1, ""), [], 0
        for chunk in stream:
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                n_pieces += bool(choice.delta.content)
                for token in choice.logprobs.content or [] if choice.logprobs else []:
                    answer.bits.append([[t.token, t.logprob] for t in token.top_logprobs])
            timings = (chunk.model_extra or {}).get("timings")
            if timings:
                answer.evaluated, answer.prompt = timings["prompt_n"], timings["prompt_n"] + timings["cache_n"]
            if stop_after is not None and n_pieces >= stop_after:
                stream.close()
                break
        answer.text = "".join(pieces)
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class InProcess:
    """tca_gguf.Llama; the prompt's tokens are counted where they are handed to llama_decode."""

    def __init__(self, model: str, dense: bool, n_ctx: int, slots: int | None = 1, threads: int = 2) -> None:
        from tca_gguf import Llama
        from tca_gguf.llama import load

        self.lib = load()
        self.llm = Llama(model, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512, verbose=False,
                         kv_overrides={"tca.enabled": False} if dense else None, flash_attn=not dense)  # fmt: skip
        self.decoded = 0
        decode = self.llm._ctx.decode

        def counted(batch: Any) -> Any:
            self.decoded += batch.n_tokens()
            return decode(batch)

        self.llm._ctx.decode = counted
        vocab = self.lib.llama_model_get_vocab(self.llm.model)
        self.ends = [t for t in range(self.llm.n_vocab()) if self.lib.llama_vocab_is_eog(vocab, t)]

    def use_cache(self) -> None:
        self.llm.set_cache(self.lib.LlamaRAMCache(capacity_bytes=4 << 30))

    def ask(self, messages: Messages, n: int, *, stop_after: int | None = None, fresh: bool = False) -> Answer:
        if fresh:
            self.llm.reset()
        answer, first = Answer(0, -1, ""), self.decoded

        def look(ids: Any, scores: Any) -> Any:
            if answer.evaluated < 0:
                answer.evaluated, answer.prompt = self.decoded - first, len(ids)
            if len(answer.bits) < COMPARED:
                answer.bits.append(hashlib.sha256(scores.tobytes()).hexdigest()[:16])
            scores[self.ends] = -float("inf")
            return scores

        stream = self.llm.create_chat_completion(messages, max_tokens=n, temperature=0, stream=True,
                                                 logits_processor=self.lib.LogitsProcessorList([look]))  # fmt: skip
        pieces = []
        for chunk in stream:
            piece = chunk["choices"][0]["delta"].get("content")
            pieces += [piece] if piece else []
            if stop_after is not None and len(pieces) >= stop_after:
                stream.close()
                break
        answer.text = "".join(pieces)
        return answer

    def close(self) -> None:
        self.llm.close()


# ---- the rows --------------------------------------------------------------------------------------------------------


def edited(messages: Messages, at: int, content: str) -> Messages:
    return [*messages[:at], messages[at] | {"content": content}, *messages[at + 1 :]]


def rows(client: Any, talk: Messages, long_answer: int) -> Iterator[tuple[str, Messages, Answer]]:
    """(name, messages, answer) of every row in one conversation, in an order in which each starts from what the last left."""
    first = client.ask(talk, COMPARED)
    yield "first prompt", talk, first
    client.ask(talk, 600, stop_after=600)
    yield "stops an answer of 600, sends the prompt again", talk, client.ask(talk, COMPARED)
    client.ask(talk, 650)
    yield "regenerates an answer of 650", talk, client.ask(talk, COMPARED)
    if long_answer:
        client.ask(talk, long_answer)
        yield f"regenerates an answer of {long_answer}", talk, client.ask(talk, COMPARED)
    client.ask(talk, 650)
    short = [*talk, {"role": "assistant", "content": "It was number 412."}, {"role": "user", "content": "And the lantern?"}]
    answer = client.ask(short, COMPARED)
    yield "replaces the last long answer by a short one", short, answer
    more = [*short, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And the mill? " + text("more", 600)}]
    yield "goes on", more, client.ask(more, COMPARED)
    other = edited(short, len(talk) - 1, "Now say in ten words what the document says about the ferry.")[: len(talk)]
    yield "edits the message before the last", other, client.ask(other, COMPARED)
    early = edited(talk, 3, "Another question. " + text("early", len(talk[3]["content"]) - 20))
    yield "edits an early message", early, client.ask(early, COMPARED)


def changing(client: Any, one: Messages, two: Messages, what: str) -> Iterator[tuple[str, Messages, Answer]]:
    """Two conversations in turn: each goes on after the other one was answered."""
    answers = []
    for number, talk in enumerate((one, two), 1):
        answers.append(client.ask(talk, COMPARED))
        yield f"two conversations in turn on {what}, first prompt of number {number}", talk, answers[-1]
    for number, (talk, answer) in enumerate(zip((one, two), answers, strict=True), 1):
        talk = [*talk, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And the anchor?"}]
        yield f"two conversations in turn on {what}, back to number {number}", talk, client.ask(talk, COMPARED)


def run(args: argparse.Namespace) -> None:
    from tca_gguf import native

    kind: Callable[..., Any] = {"server": Server, "llama": InProcess}[args.client]
    turns = 8 if args.history <= 8192 else 16
    one, two = conversation("one", args.history, turns), conversation("two", args.history, turns)
    n_ctx = args.ctx or -(-(int(args.history * 1.1) + args.long + 1400) // 256) * 256
    info = {"model": Path(args.model).name, "client": args.client, "cache": "dense" if args.dense else "tca", "history": args.history,
            "n_ctx": n_ctx, "label": args.label, "build": native.build_info(), "rows": []}  # fmt: skip
    reference = None if args.no_compare else kind(args.model, args.dense, n_ctx, 1, args.threads)
    cached: dict[str, Answer] = {}

    def check(client: Any, found: Iterator[tuple[str, Messages, Answer]]) -> None:
        for name, messages, answer in found:
            row: dict[str, Any] = {"row": name, "prompt": answer.prompt, "evaluated": answer.evaluated}
            if reference is not None:
                key = json.dumps(messages)
                if key not in cached:
                    cached[key] = reference.ask(messages, COMPARED, fresh=True)
                fresh = cached[key]
                row["same_text"] = fresh.text == answer.text
                row["same_bits"] = sum(a == b for a, b in zip(fresh.bits, answer.bits, strict=False))
                row["of"] = len(fresh.bits)
            info["rows"].append(row)
            print(json.dumps(row), flush=True)
            Path(args.save).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def play(slots: int | None, size: int, found: Callable[[Any], Iterator[tuple[str, Messages, Answer]]], cache: bool = False) -> None:
        client = kind(args.model, args.dense, size, slots, args.threads)
        try:
            if cache:
                client.use_cache()
            check(client, found(client))
        except Exception as error:  # a refused request or a server that ended is a result too
            ended = client.process.poll() if args.client == "server" else None
            reason = f"{type(error).__name__}: {error}" + (f" (llama-server ended with {ended}, log {client.log})" if ended is not None else "")
            info["rows"].append({"row": "the rest is refused", "error": reason[:400]})
            Path(args.save).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
            print(reason, file=sys.stderr)
        finally:
            client.close()

    try:
        if "turns" in args.rows:
            play(1, n_ctx, lambda client: rows(client, one, args.long))
        if "changing" in args.rows:
            what = "one slot" if args.client == "server" else "one Llama with a RAM cache"
            play(1, n_ctx, lambda client: changing(client, one, two, what), cache=args.client == "llama")
        if "slots" in args.rows and args.client == "server":
            play(None, 2 * n_ctx, lambda client: changing(client, one, two, "two slots"))
    finally:
        if reference is not None:
            reference.close()


# ---- the table -------------------------------------------------------------------------------------------------------


def table(files: list[str]) -> None:
    """Markdown: a table a (client, model, history), a column a run (cache and label), in the order of the files."""
    runs = [json.loads(Path(name).read_text(encoding="utf-8")) for name in files]
    groups: dict[tuple[str, str, int], list[Any]] = {}
    for info in runs:
        groups.setdefault((info["client"], info["model"], info["history"]), []).append(info)
    for (client, model, history), found in groups.items():
        print(f"\n{'llama-server' if client == 'server' else 'tca_gguf.Llama'}, {model}, a history of {history} tokens:\n")
        titles = [" ".join(filter(None, (info["cache"], info["label"]))) for info in found]
        print("| what the client does | prompt | " + " | ".join(titles) + " |")
        print("|---|---|" + "---|" * len(found))
        names = dict.fromkeys(row["row"] for info in found for row in info["rows"])
        for name in names:
            cells = []
            prompt = ""
            for info in found:
                row = next((row for row in info["rows"] if row["row"] == name), None)
                if row is None:
                    cells.append("")
                    continue
                if "error" in row:
                    cells.append("refused")
                    continue
                prompt = f"{row['prompt']:,}"
                same = "" if "of" not in row else ", same bits" if row["same_bits"] == row["of"] else ", same text" if row["same_text"] else ", other text"
                cells.append(f"{row['evaluated']:,}{same}")
            print(f"| {name} | {prompt} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("model")
    one.add_argument("--client", choices=("server", "llama"), required=True)
    one.add_argument("--dense", action="store_true", help="the stock cache of the same file")
    one.add_argument("--history", type=int, default=4096)
    one.add_argument("--long", type=int, default=3000, help="tokens of the long answer that is regenerated; 0: leave it out")
    one.add_argument("--ctx", type=int, help="tokens of the context  [default: as needed]")
    one.add_argument("--rows", nargs="+", choices=("turns", "changing", "slots"), default=["turns", "changing", "slots"])
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--no-compare", action="store_true", help="count only")
    one.add_argument("--label", default="", help="what the column is called beside the cache")
    one.add_argument("--save", required=True)
    two = commands.add_parser("table")
    two.add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        table(args.files)


if __name__ == "__main__":
    sys.exit(main())
