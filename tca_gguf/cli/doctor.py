"""doctor: what is here, and the command that mends what is not."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from .common import ModelName, Number, emit_json, json_option, kv_type_option, out

MARKS = {True: ("ok", "green"), False: ("!", "bold red"), None: ("-", "dim")}


@click.command("doctor")
@click.argument("model", type=ModelName(), required=False)
@click.option("-c", "--ctx", type=Number(0), help="Tokens of the context; 0: as the model was trained.  [default: 8192, or what the model was trained for]")
@kv_type_option
@json_option
@click.pass_context
def doctor_command(context: click.Context, model: Path | None, ctx: int | None, kv_type: str, as_json: bool) -> None:
    """Say what was found, the processor, GPUs, memory, MODEL, its budgets and its cache, whether it fits, and how to mend what is wrong.

    No model is run. The exit code is 1 if something is wrong.

    \b
    Example:
      tca-gguf doctor
      tca-gguf doctor model.gguf -c 32768
    """
    from tca_gguf.doctor import examine

    report = examine(model, ctx, kv_type)
    if as_json:
        emit_json(report.as_json())
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for check in report.checks:
            mark, style = MARKS[check.ok]
            table.add_row(Text(mark, style=style), Text(check.name, style="bold"), Text(check.text))
            if check.fix:
                table.add_row("", "", Text(f"-> {check.fix}", style="yellow"))
        out().print(table)
    if not report.well:
        context.exit(1)
