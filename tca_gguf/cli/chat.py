"""chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import select
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
/retry         answer the last message again (so does /regen)
/undo [N]      take back the last message with its answer, or the last N
/edit [TEXT]   put TEXT in place of the last message and answer that; without TEXT the old one is there to be changed
/read FILE     the next message begins with the text of FILE
/stats         KV memory, kept tokens, checkpoints and speed (/stats --json for programs)
/reset         forget the conversation
/help          this list
/exit          leave (as Ctrl-D does)
Ctrl-C         stop the reply
Pasted text of several lines is one message; so is what stands between two lines of \"\"\"."""
FENCE = '"' * 3


def stats_of(chat: Chat) -> dict[str, Any]:
    """The cache and the last turn: {"tca", "n_ctx", "tokens", ..., "turns", "last": {...} or null}."""
    stats = cache_stats(chat.engine.llm)
    last = chat.turns[-1] if chat.turns else None
    stats["turns"] = len(chat.turns)
    stats["last"] = last and {
        "prompt_tokens": last.prompt_tokens,
        "evaluated_tokens": last.evaluated_tokens,
        "reused_tokens": last.reused_tokens,
        "source": last.source,
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
    kept_states = stats.get("checkpoints")
    if kept_states:
        lines.append(f"back     {kept_states['count']} checkpoints, {size(kept_states['bytes'])} of {size(kept_states['limit_bytes'])}")
    last = stats["last"]
    if last:
        how = " from a checkpoint" if last.get("source") == "checkpoint" else ""
        lines.append(f"prompt   {last['evaluated_tokens']} new tokens at {last['prefill_tps']:.0f}/s, {last['reused_tokens']} reused{how}")
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


class Messages:
    """The user's messages, from a terminal or a pipe."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._readline: Any = None
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # line editing and history for input()

                readline.parse_and_bind("set enable-bracketed-paste on")  # pasted line ends stay in the line
                self._readline = readline

    def _line(self, start: str = "", prompt: str = "> ") -> str | None:
        """One line, None at the end of the input. start: text that is there to be changed. Ctrl-C clears the line."""
        if start and self._readline:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(start))
        try:
            while True:
                try:
                    return input(prompt if self.interactive else "")
                except KeyboardInterrupt:
                    click.echo("\n(Ctrl-D or /exit leaves)", err=True)
                except EOFError:
                    return None
                except UnicodeDecodeError:
                    fail("the input is not UTF-8 text")
        finally:
            if start and self._readline:
                self._readline.set_startup_hook(None)

    def _waiting(self) -> bool:
        """Whether a terminal has another line already: the rest of a paste, where the terminal does not mark pastes."""
        return self.interactive and sys.platform != "win32" and bool(select.select([sys.stdin], [], [], 0.02)[0])

    def next(self, start: str = "") -> str | None:
        """The next message; None at the end of the input."""
        line = self._line(start)
        if line is None:
            return None
        lines = [line]
        if line.strip() == FENCE:
            lines = []
            while (line := self._line(prompt=". ")) is not None and line.strip() != FENCE:
                lines.append(line)
        else:
            while self._waiting() and (line := self._line(prompt="")) is not None:
                lines.append(line)
        return "\n".join(lines)


def read_file(name: str) -> str:
    """The text of a file. Raises TcaError."""
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TcaError(f"{path} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise TcaError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


class Conversation:
    """The commands of a chat over a Chat."""

    def __init__(self, chat: Chat, messages: Messages) -> None:
        self.chat, self.messages = chat, messages
        self.interrupt = Interrupt()
        self.attached: list[str] = []  # texts of files that go before the next message

    def say(self, pieces: Iterator[str]) -> None:
        """Prints a reply as it comes."""
        turns = len(self.chat.turns)
        with self.interrupt.during_reply():
            try:
                for piece in pieces:
                    click.echo(piece, nl=False)
                click.echo()
            except TcaError as error:
                fail(str(error))
                return
        if self.interrupt.set:
            click.echo("(stopped)", err=True)
        elif len(self.chat.turns) > turns and self.chat.turns[-1].stopped == "context":
            click.echo("(the context is full; /undo takes back a message, /reset starts over)", err=True)

    def stopped(self) -> bool:
        return self.interrupt.set

    def ask(self, text: str) -> None:
        before = len(self.chat.messages)
        self.say(self.chat.ask("\n\n".join([*self.attached, text]), self.stopped))
        if len(self.chat.messages) != before:
            self.attached.clear()

    def command(self, name: str, rest: str) -> bool:
        """Does a command. False if there is none of that name."""
        chat = self.chat
        if name == "help":
            click.echo(HELP)
        elif name == "reset":
            chat.reset()
            self.attached.clear()
            click.echo("(the conversation is forgotten)", err=True)
        elif name == "stats":
            stats = stats_of(chat)
            click.echo(json.dumps(stats) if "--json" in rest.split() else stats_text(stats))
        elif name in ("retry", "regen", "edit") and not chat.asked:
            fail("nothing was asked yet")
        elif name in ("retry", "regen"):
            self.say(chat.retry(self.stopped))
        elif name == "edit":
            text: str | None = rest
            if not rest and self.messages.interactive:
                text = self.messages.next(start=chat.asked[-1])
            if text and text.strip():
                self.say(chat.edit(text, self.stopped))
            else:
                fail("the message is empty; give its new text: /edit TEXT")
        elif name == "undo":
            if rest and not (rest.isdecimal() and int(rest) > 0):
                fail(f"{rest!r} is no number of messages; give one, as in: /undo 2")
                return True
            taken = chat.undo(int(rest or 1))
            if taken:
                what = "the last message" if len(taken) == 1 else f"the last {len(taken)} messages"
                click.echo(f"({what} taken back; {len(chat.asked)} left)", err=True)
            else:
                fail("nothing was asked yet")
        elif name == "read":
            if not rest:
                fail("give the path of a text file: /read FILE")
                return True
            try:
                text = read_file(rest)
            except TcaError as error:
                fail(str(error))
                return True
            self.attached.append(text)
            click.echo(f"({rest}: {len(text)} characters, read with your next message)", err=True)
        else:
            return False
        return True

    def run(self) -> None:
        """Reads messages and answers them until the end of the input or /exit."""
        while (message := self.messages.next()) is not None:
            words = message.split(maxsplit=1)
            if not words:
                continue
            name = words[0][1:] if words[0].startswith("/") and "\n" not in message.strip() else ""
            if name in ("exit", "quit"):
                return
            if name.isalpha() and self.command(name, words[1].strip() if len(words) > 1 else ""):
                continue
            if name.isalpha():
                click.echo(f"unknown command {words[0]}; /help lists them", err=True)
            else:
                self.ask(message)
        if self.messages.interactive:
            click.echo()


@click.command("chat")
@model_argument
@click.option("-s", "--system", help="System message, what the model should be.")
@click.option("-n", "--n-predict", type=Number(-1), default=-1, help="Tokens of a reply at most.  [default: no limit]")
@click.option("-c", "--ctx", type=Number(0), default=8192, show_default=True, help="Tokens of the context; 0: as the model was trained.")
@click.option("--checkpoints", type=Number(0), metavar="MIB", help="Host memory for checkpoints, in MiB; 0: none.  [default: TCA_CHECKPOINT_MIB, else 512]")
@model_options
def chat_command(
    model: Path,
    system: str | None,
    n_predict: int,
    ctx: int,
    checkpoints: int | None,
    temp: float,
    seed: int | None,
    kv_type: str,
    dense: bool,
    threads: int | None,
    rpc: str | None,
    gpu_layers: int,
    verbose: bool,
) -> None:
    """Talk to MODEL in the terminal, with the file's own chat template.

    The cache is kept from turn to turn: only what is new is evaluated. /retry, /undo and /edit go back from checkpoints,
    /read FILE puts a file before your next message, /help lists the commands, Ctrl-C stops a reply. Pasted text of several
    lines is one message. Lines may be piped in, one a turn.

    \b
    Example:
      tca-gguf chat model.gguf -c 32768
    """
    interactive = sys.stdin.isatty()
    messages = Messages(interactive)
    llm = open_llama(model, n_ctx=ctx, kv_type=kv_type, dense=dense, n_threads=threads, n_gpu_layers=gpu_layers, rpc_servers=rpc,
                     seed=seed, verbose=verbose, checkpoint_bytes=None if checkpoints is None else checkpoints << 20)  # fmt: skip
    try:
        conversation = Chat(Engine(llm, Sampling(temperature=temp)), system=system, n_max=n_predict)
        if interactive:
            stats = cache_stats(llm)
            kind = "TCA" if stats["tca"] else "dense"
            click.echo(f"{model.name}, context of {stats['n_ctx']} tokens, {kind} KV cache of {size(stats['kv_bytes'])}; /help for help", err=True)
        Conversation(conversation, messages).run()
    finally:
        llm.close()
