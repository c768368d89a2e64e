"""What the commands share: errors in one line, options, numbers for people, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tca_gguf import names
from tca_gguf.errors import TcaError
from tca_gguf.loading import KV_TYPES

F = TypeVar("F", bound=Callable[..., Any])


class OneLineErrors(click.Group):
    """A command group whose errors are one line on stderr. Exit codes: 1 error, 2 wrong usage, 130 interrupted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a user's first steps, not of the alphabet

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        if not standalone:
            return super().main(args, prog_name or "tca-gguf", standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name or "tca-gguf", standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "tca-gguf"
            fail(f"{error.format_message().rstrip('.')}; see: {where} --help")
            code = 2
        except click.ClickException as error:
            fail(error.format_message())
            code = 1
        except TcaError as error:
            fail(str(error))
            code = 1
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted")
            code = 130
        except BrokenPipeError:
            # the reader of our output went away (`tca-gguf ... | head`); Python must not complain about it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> None:
    """One line on stderr."""
    click.echo(f"error: {' '.join(message.split())}", err=True)


def emit_json(value: Any) -> None:
    """One object on stdout, and nothing else."""
    click.echo(json.dumps(value, ensure_ascii=False))


def out() -> Console:
    """For people, on stdout."""
    return Console(highlight=False)


EVERY = 5.0  # seconds between the lines of progress where stderr is no terminal


class PlainProgress:
    """Progress for a log: a line every few seconds, none for what is done sooner. now: seconds, for the tests."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.now = console, now
        self.started = self.said = now()

    def due(self) -> bool:
        """Whether it is time for another line; it is then taken as said."""
        if self.now() - self.said < EVERY:
            return False
        self.said = self.now()
        return True

    def advance(self, done: int, total: int, label: str = "") -> None:
        if self.due() and total > 0:
            spent = self.now() - self.started
            left = f", about {duration(spent * (total - done) / done)} left" if done else ""
            self.console.print(f"{label + ': ' if label else ''}{100 * done // total}% after {duration(spent)}{left}", markup=False)


def duration(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left on stderr, a line every few seconds where that is no terminal; yields advance(done, total, label)."""
    console = Console(stderr=True, highlight=False)
    if enabled and not console.is_terminal:
        yield PlainProgress(console).advance
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not enabled,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, label: str = "") -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield advance


class StatusLine:
    """One line on stderr that changes; a line every few seconds where that is no terminal. Notes are always printed."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.plain = PlainProgress(self.console)
        self.status = self.console.status("") if self.console.is_terminal else None

    def __call__(self, text: str) -> None:
        if text.startswith("note: "):
            self.console.print(text, markup=False)
        elif self.status is not None:
            self.status.update(escape(text))
        elif self.plain.due():
            self.console.print(text, markup=False)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While something is printed on stdout, which is often the same terminal."""
        if self.status is None:
            yield
            return
        self.status.stop()
        try:
            yield
        finally:
            self.status.start()


@contextmanager
def status_line() -> Iterator[StatusLine]:
    line = StatusLine()
    with line.status or nullcontext():
        yield line


def size(n_bytes: float) -> str:
    """12345678 -> "12.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.{1 if n_bytes < 100 * scale else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


def tokens_short(n: int) -> str:
    """32768 -> "32K"."""
    return f"{n // 1024}K" if n % 1024 == 0 and n else str(n)


# ---- types of options -------------------------------------------------------------------------------------------------


class Number(click.ParamType):
    """A number from ``low`` to ``high`` (whole, unless low is a float); says so in words when it is not."""

    name = "N"

    def __init__(self, low: float, high: float | None = None, *, above: bool = False) -> None:
        self.low, self.high, self.above, self.whole = low, high, above, isinstance(low, int)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            number = int(value) if self.whole else float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a {'whole ' if self.whole else ''}number", param, ctx)
        inside = number > self.low if self.above else number >= self.low
        if not inside or (self.high is not None and number > self.high):
            lower = f"{'above' if self.above else 'at least'} {self.low:g}"
            upper = "" if self.high is None else f" and at most {self.high if self.whole else format(self.high, 'g')}"
            self.fail(f"{value} must be {lower}{upper}", param, ctx)
        return number


class IntList(click.ParamType):
    """Positive numbers separated by commas; 16K is 16384."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for part in str(value).split(","):
            text = part.strip().lower()
            scale = 1024 if text.endswith("k") else 1
            digits = text[:-1] if scale > 1 else text
            if not digits.isascii() or not digits.isdigit() or not 0 < int(digits) * scale <= 1 << 24:
                self.fail(f"{part.strip()!r} is not a number of tokens (examples: 4096, 16K)", param, ctx)
            numbers.append(int(digits) * scale)
        return tuple(dict.fromkeys(numbers))


class ChoiceList(click.ParamType):
    """Some of the allowed words, separated by commas."""

    def __init__(self, choices: list[str]) -> None:
        self.choices, self.name = choices, ",".join(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(word.strip() for word in str(value).split(",")))
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        return words


class NameList(click.ParamType):
    """Words separated by commas; what they name is checked where they are used."""

    name = "NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(word.strip() for word in str(value).split(",")))
        if not all(words):
            self.fail(f"{value!r} holds an empty name", param, ctx)
        return words


class FractionList(click.ParamType):
    """Numbers above 0 and at most 1, separated by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        one = Number(0.0, 1.0, above=True)
        return tuple(dict.fromkeys(one.convert(part.strip(), param, ctx) for part in str(value).split(",")))


# ---- options ---------------------------------------------------------------------------------------------------------


class ModelName(click.ParamType):
    """A model as people name it, see `names`; its path."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return value if isinstance(value, Path) else names.resolve(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def model_argument(f: F) -> F:
    return click.argument("model", type=ModelName())(f)


def json_option(f: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")(f)


def verbose_option(f: F) -> F:
    return click.option("--verbose", is_flag=True, help="Show llama.cpp's own log on stderr.")(f)


def threads_option(f: F) -> F:
    return click.option("--threads", type=Number(1), help="CPU threads.  [default: all]")(f)


def gpu_layers_option(f: F) -> F:
    return click.option("--gpu-layers", type=Number(-1), default=0, show_default=True, help="Layers to run on the GPU, -1 for all.")(f)


def kv_type_option(f: F) -> F:
    return click.option(
        "--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of the KV cache."
    )(f)


def model_options(f: F) -> F:
    """Options of the commands that talk to a model."""
    for option in (
        verbose_option,
        gpu_layers_option,
        threads_option,
        click.option("--rpc", metavar="HOST:PORT,...", help="Other machines that may take layers, with --gpu-layers (exec rpc-server)."),
        click.option("--dense", is_flag=True, help="Ignore the file's budgets: llama.cpp's stock cache."),
        kv_type_option,
        click.option("--seed", type=Number(0, 2**32 - 1), help="Seed of the sampling.  [default: random]"),
        click.option("--temp", type=Number(0.0), default=0.8, show_default=True, help="Temperature; 0 is greedy."),
    ):
        f = option(f)
    return f
