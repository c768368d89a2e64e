"""The commands: one file each; this one ties them together. Help texts also make docs/cli.md (see docs.py)."""

from __future__ import annotations

import click

from tca_gguf import __version__

from .bench import bench_command
from .chat import chat_command
from .common import OneLineErrors
from .completion import completion_command
from .demo import demo_command
from .doctor import doctor_command
from .embed import embed_budgets, strip_budgets
from .eval import eval_command
from .execute import activate_command, deactivate_command, execute
from .generate import generate_command
from .inspect import inspect_command
from .models import models_command

__all__ = ["cli", "main"]


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="tca-gguf")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """TCA sparse attention for GGUF models: less KV memory, faster long contexts.

    Calibrate a model once, then use it anywhere the patched llama.cpp runs.

    \b
    Example:
      tca-gguf demo
      tca-gguf embed-budgets model.gguf
      tca-gguf chat model.gguf
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (
    embed_budgets,
    strip_budgets,
    inspect_command,
    models_command,
    generate_command,
    chat_command,
    bench_command,
    eval_command,
    demo_command,
    execute,
    activate_command,
    deactivate_command,
    doctor_command,
    completion_command,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of `tca-gguf` and `python -m tca_gguf`."""
    cli()
