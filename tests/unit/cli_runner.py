"""Runs a command line of tca-gguf in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tca_gguf.cli import cli


def run(*args: str, text: str | None = None) -> Result:
    """text: what the command reads from standard input."""
    return CliRunner().invoke(cli, list(args), input=text)
