"""completion: the shell's own completion of commands, options and files."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from tca_gguf.errors import TcaError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def completion_command(shell: str | None) -> None:
    """Print what makes SHELL complete tca-gguf's commands, options and model files.  SHELL: the one in use, if it is not given.

    \b
    Example:
      tca-gguf completion bash > ~/.local/share/bash-completion/completions/tca-gguf
      tca-gguf completion fish > ~/.config/fish/completions/tca-gguf.fish
    """
    from . import cli

    shell = shell or Path(os.environ.get("SHELL", "")).name
    completion = get_completion_class(shell) if shell in SHELLS else None
    if completion is None:
        raise TcaError(f"the shell {shell or 'in use'} is not known here; name one: {', '.join(SHELLS)}")
    click.echo(completion(cli, {}, "tca-gguf", "_TCA_GGUF_COMPLETE").source_template % {
        "complete_func": "_tca_gguf_completion", "complete_var": "_TCA_GGUF_COMPLETE", "prog_name": "tca-gguf"})  # fmt: skip
