"""exec, activate, deactivate: llama.cpp's own programs, and programs that import llama_cpp, over the patched runtime."""

from __future__ import annotations

import os
import sys

import click

from tca_gguf import names
from tca_gguf.errors import TcaError

from .common import emit_json, json_option

PROGRAMS = (
    "llama-server", "llama-cli", "llama-completion", "llama-mtmd-cli", "llama-bench", "llama-perplexity", "llama-quantize", "llama-imatrix",
    "llama-gguf-split", "rpc-server",
)  # fmt: skip


@click.command("exec", context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False, options_metavar="")
@click.argument("program", required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def execute(ctx: click.Context, program: str | None, args: tuple[str, ...]) -> None:
    """Run a program over the patched runtime: one of llama.cpp's own, or any that imports llama_cpp.

    llama-server, llama-cli, llama-completion, llama-mtmd-cli, llama-bench and llama-perplexity use the budgets of the model file.
    Beside them there are llama-quantize, llama-imatrix, llama-gguf-split and rpc-server; `--override-kv tca.enabled=bool:false`
    switches them to the stock cache. Any other command runs with `import llama_cpp` set to our libraries, with nothing changed
    in it. All arguments go to the program.

    \b
    Example:
      tca-gguf exec llama-server -m model.gguf -c 32768
      tca-gguf exec llama-bench -m model.gguf -d 16384
      tca-gguf exec python app.py
    """
    if program is None or program in ("-h", "--help"):
        click.echo(ctx.get_help())
        return
    from tca_gguf import dropin

    path = dropin.find_program(program, os.environ)
    # models as people name them, behind the option of llama.cpp's programs
    args = tuple(str(names.resolve(arg)) if before in ("-m", "--model") and arg.startswith((names.OLLAMA, names.HF)) else arg
                 for before, arg in zip(("", *args), args, strict=False))  # fmt: skip
    sys.stdout.flush()
    try:
        os.execve(path, [str(path), *args], dropin.environment(os.environ))
    except OSError as error:
        raise TcaError(f"{path} cannot be run: {error.strerror}") from None


@click.command("activate")
@json_option
def activate_command(as_json: bool) -> None:
    """Let every program of this virtual environment that imports llama_cpp run on the patched runtime.

    Run it in the environment that tca-gguf is installed in. The libraries of its llama-cpp-python become links to ours; where
    none is installed it gets our copy of the pinned version, without compiling. Another version is refused.

    \b
    Example:
      tca-gguf activate
      python app.py
      tca-gguf deactivate
    """
    from tca_gguf import dropin

    dropin.check_environment()
    _say(dropin.activate(), as_json)


@click.command("deactivate")
@json_option
def deactivate_command(as_json: bool) -> None:
    """Undo activate: llama_cpp in this virtual environment is what it was.

    \b
    Example:
      tca-gguf deactivate
    """
    from tca_gguf import dropin

    dropin.check_environment()
    _say(dropin.deactivate(), as_json)


def _say(lines: list[str], as_json: bool) -> None:
    if as_json:
        emit_json({"done": lines})
    else:
        click.echo("\n".join(lines))
