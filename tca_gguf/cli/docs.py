"""Writes docs/cli.md: python -m tca_gguf.cli.docs > docs/cli.md, and docs/models.md: python -m tca_gguf.cli.docs models > docs/models.md.
Tests check that both are up to date."""

from __future__ import annotations

import sys

import click

from . import cli, models

WIDTH = 100


def click_version() -> str:
    """Major and minor version of click; help texts look a little different from one to the next."""
    from importlib.metadata import version

    return ".".join(version("click").split(".")[:2])


def help_of(name: str, command: click.Command) -> str:
    parent = click.Context(cli, info_name="tca-gguf", terminal_width=WIDTH, max_content_width=WIDTH, **cli.context_settings)
    return command.get_help(click.Context(command, parent=parent, info_name=name))


def document() -> str:
    parts = [
        "# Commands",
        f"<!-- made by python -m tca_gguf.cli.docs with click {click_version()}; edit the docstrings, not this file -->",
        "`tca-gguf COMMAND` and `python -m tca_gguf COMMAND` are the same. Errors are one line on stderr: exit code 1, or 2 "
        "for wrong usage. `--json` prints one object on stdout and nothing else; progress goes to stderr.",
    ]
    for name, command in cli.commands.items():
        parts += [f"## {name}", f"```text\n{help_of(name, command)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(models.document() if sys.argv[1:] == ["models"] else document(), end="")
