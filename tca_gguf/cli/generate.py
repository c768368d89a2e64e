"""generate: one reply to one prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tca_gguf.chat import Engine, Sampling, Turn, cache_stats, chat_prompt
from tca_gguf.errors import TcaError
from tca_gguf.loading import context_size, open_llama

from .common import Number, emit_json, json_option, model_argument, model_options, size


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt: the file's text, then the given one."""
    parts = []
    if file is not None:
        try:
            parts.append(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise TcaError(f"{file} is not UTF-8 text") from None
        except OSError as error:
            raise TcaError(f"{file} cannot be read: {error.strerror}") from None
    if text is not None:
        parts.append(text)
    prompt = "\n\n".join(parts)
    if not prompt.strip():
        raise click.UsageError("an empty prompt; give one with -p TEXT or -f FILE")
    return prompt


@click.command("generate")
@model_argument
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from a file (- for stdin); -p is added after it.")
@click.option("-n", "--n-predict", type=Number(-1), default=256, show_default=True, help="Tokens to generate at most; -1: until the context is full.")
@click.option("-c", "--ctx", type=Number(0), help="Tokens of the context; 0: as the model was trained.  [default: as needed]")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the file's chat template.")
@model_options
@json_option
def generate_command(
    model: Path,
    prompt: str | None,
    file: Path | None,
    n_predict: int,
    ctx: int | None,
    raw: bool,
    temp: float,
    seed: int | None,
    kv_type: str,
    dense: bool,
    threads: int | None,
    rpc: str | None,
    gpu_layers: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Let MODEL answer a prompt, or with --raw continue a text.

    \b
    Example:
      tca-gguf generate model.gguf -p "Write a haiku about rivers."
      tca-gguf generate model.gguf -f report.txt -p "Sum this up in three sentences." --temp 0
    """
    text = read_prompt(prompt, file)
    # a byte of UTF-8 is at most one token, and templates add a few; a text of n bytes seldom has more than n/3 tokens
    needed = len(text.encode("utf-8")) // 3 + 512 + max(n_predict, 0)
    n_ctx = ctx if ctx is not None else (0 if n_predict < 0 else context_size(needed))
    llm = open_llama(model, n_ctx=n_ctx, kv_type=kv_type, dense=dense, n_threads=threads, n_gpu_layers=gpu_layers,
                     rpc_servers=rpc, seed=seed, verbose=verbose)  # fmt: skip
    try:
        engine, turn = Engine(llm, Sampling(temperature=temp)), Turn()
        full = text if raw else chat_prompt(llm, [{"role": "user", "content": text}])
        pieces = []
        for _, piece in engine.reply(engine.tokenize_prompt(full), n_predict, turn):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        stats = cache_stats(llm)
    finally:
        llm.close()
    if as_json:
        emit_json(
            {
                "text": "".join(pieces),
                "stopped": turn.stopped,
                "prompt_tokens": turn.prompt_tokens,
                "generated_tokens": turn.generated_tokens,
                "prefill_tps": round(turn.prefill_tps, 3),
                "decode_tps": round(turn.decode_tps, 3),
                **stats,
            }
        )
        return
    click.echo()
    click.echo(
        f"[{turn.prompt_tokens} tokens at {turn.prefill_tps:.0f}/s, {turn.generated_tokens} at {turn.decode_tps:.1f}/s, "
        f"KV {size(stats['kv_bytes'])}{'' if stats['tca'] else ' dense'}]",
        err=True,
    )
