"""exec: llama.cpp's own programs, built from the patched tree."""

from __future__ import annotations

import os
import sys

import click

from tca_gguf import names
from tca_gguf.errors import TcaError

PROGRAMS = (
    "llama-server", "llama-cli", "llama-completion", "llama-mtmd-cli", "llama-bench", "llama-perplexity", "llama-quantize", "llama-imatrix",
    "llama-gguf-split", "rpc-server",
)  # fmt: skip


@click.command("exec", context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False, options_metavar="")
@click.argument("program", required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def execute(ctx: click.Context, program: str | None, args: tuple[str, ...]) -> None:
    """Run one of llama.cpp's own programs over the patched runtime.

    llama-server, llama-cli, llama-completion, llama-mtmd-cli, llama-bench and llama-perplexity use the budgets of the model file.
    Beside them there are llama-quantize, llama-imatrix, llama-gguf-split and rpc-server. All arguments go to the program;
    `--override-kv tca.enabled=bool:false` switches to the stock cache.

    \b
    Example:
      tca-gguf exec llama-server -m model.gguf -c 32768
      tca-gguf exec llama-bench -m model.gguf -d 16384
    """
    if program is None or program in ("-h", "--help"):
        click.echo(ctx.get_help())
        return
    from tca_gguf.llama import program as find

    path = find(program)
    # models as people name them, behind the option of llama.cpp's programs
    args = tuple(str(names.resolve(arg)) if before in ("-m", "--model") else arg for before, arg in zip(("", *args), args, strict=False))
    sys.stdout.flush()
    try:
        os.execv(path, [str(path), *args])
    except OSError as error:
        raise TcaError(f"{path} cannot be run: {error.strerror}") from None
