"""chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tca_gguf.chat import Chat, Engine, Sampling, cache_stats
from tca_gguf.errors import TcaError
from tca_gguf.loading import open_llama

from .common import Number, fail, model_argument, model_options, size

HELP = """\
/stats         KV memory, kept tokens and speed (/stats --json for programs)
/reset         forget the conversation
/help          this list
/exit          leave (as Ctrl-D does)
Ctrl-C         stop the reply"""


def stats_of(chat: Chat) -> dict[str, Any]:
    """The cache and the last turn: {"tca", "n_ctx", "tokens", ..., "turns", "last": {...} or null}."""
    stats = cache_stats(chat.engine.llm)
    last = chat.turns[-1] if chat.turns else None
    stats["turns"] = len(chat.turns)
    stats["last"] = last and {
        "prompt_tokens": last.prompt_tokens,
        "evaluated_tokens": last.evaluated_tokens,
        "reused_tokens": last.reused_tokens,
        "generated_tokens": last.generated_tokens,
        "prefill_tps": round(last.prefill_tps, 3),
        "decode_tps": round(last.decode_tps, 3),
        "stopped": last.stopped,
    }
    return stats


def stats_text(stats: dict[str, Any]) -> str:
    tokens, kept = stats["tokens"], stats["kept_tokens_mean"]
    lines = [f"context  {tokens} of {stats['n_ctx']} tokens"]
    if stats["tca"]:
        share = stats["kv_bytes"] / stats["kv_bytes_dense"] if stats["kv_bytes_dense"] else 1.0
        lines.append(f"kept     {kept:.0f} tokens a head on average" + (f" ({kept / tokens:.0%})" if tokens else ""))
        lines.append(f"KV       {size(stats['kv_bytes'])} allocated, dense would be {size(stats['kv_bytes_dense'])} ({share:.0%})")
    else:
        lines.append(f"KV       {size(stats['kv_bytes'])} allocated, dense")
    last = stats["last"]
    if last:
        lines.append(f"prompt   {last['evaluated_tokens']} new tokens at {last['prefill_tps']:.0f}/s, {last['reused_tokens']} reused")
        lines.append(f"reply    {last['generated_tokens']} tokens at {last['decode_tps']:.1f}/s")
    return "\n".join(lines)


class Interrupt:
    """While a reply runs, Ctrl-C sets a flag in place of raising KeyboardInterrupt in the middle of an evaluation."""

    def __init__(self) -> None:
        self.set = False

    @contextlib.contextmanager
    def during_reply(self) -> Iterator[None]:
        self.set = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(_signal: int, _frame: object) -> None:
            self.set = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def read_line(interactive: bool) -> str | None:
    """The next line of the user; None at the end of the input. Ctrl-C clears the line."""
    while True:
        try:
            return input("> " if interactive else "")
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D or /exit leaves)", err=True)
        except EOFError:
            return None
        except UnicodeDecodeError:
            fail("the input is not UTF-8 text")


def converse(chat: Chat, interactive: bool) -> None:
    """Reads lines and answers them until the end of the input or /exit."""
    interrupt = Interrupt()
    while (line := read_line(interactive)) is not None:
        words = line.split()
        if not words:
            continue
        if words[0] in ("/exit", "/quit"):
            return
        if words[0] == "/help":
            click.echo(HELP)
        elif words[0] == "/reset":
            chat.reset()
            click.echo("(the conversation is forgotten)", err=True)
        elif words[0] == "/stats":
            stats = stats_of(chat)
            click.echo(json.dumps(stats) if "--json" in words[1:] else stats_text(stats))
        elif words[0].startswith("/") and words[0].lstrip("/").isalpha():
            click.echo(f"unknown command {words[0]}; /help lists them", err=True)
        else:
            with interrupt.during_reply():
                try:
                    for piece in chat.ask(line, lambda: interrupt.set):
                        click.echo(piece, nl=False)
                    click.echo()
                except TcaError as error:
                    fail(str(error))
            if interrupt.set:
                click.echo("(stopped)", err=True)
            elif chat.turns and chat.turns[-1].stopped == "context":
                click.echo("(the context is full; /reset starts over)", err=True)
    if interactive:
        click.echo()


@click.command("chat")
@model_argument
@click.option("-s", "--system", help="System message, what the model should be.")
@click.option("-n", "--n-predict", type=Number(-1), default=-1, help="Tokens of a reply at most.  [default: no limit]")
@click.option("-c", "--ctx", type=Number(0), default=8192, show_default=True, help="Tokens of the context; 0: as the model was trained.")
@model_options
def chat_command(
    model: Path,
    system: str | None,
    n_predict: int,
    ctx: int,
    temp: float,
    seed: int | None,
    kv_type: str,
    dense: bool,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
) -> None:
    """Talk to MODEL in the terminal, with the file's own chat template.

    The cache is kept from turn to turn: only what is new is evaluated. /help lists the commands, Ctrl-C stops a reply.
    Lines may be piped in, one a turn.

    \b
    Example:
      tca-gguf chat model.gguf -c 32768
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  - line editing and history for input()
    llm = open_llama(model, n_ctx=ctx, kv_type=kv_type, dense=dense, n_threads=threads, n_gpu_layers=gpu_layers,
                     seed=seed, verbose=verbose)  # fmt: skip
    try:
        conversation = Chat(Engine(llm, Sampling(temperature=temp)), system=system, n_max=n_predict)
        if interactive:
            stats = cache_stats(llm)
            kind = "TCA" if stats["tca"] else "dense"
            click.echo(f"{model.name}, context of {stats['n_ctx']} tokens, {kind} KV cache of {size(stats['kv_bytes'])}; /help for help", err=True)
        converse(conversation, interactive)
    finally:
        llm.close()
