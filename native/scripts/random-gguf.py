#!/usr/bin/env python3
"""Writes GGUF files with random weights (Q4_0, architecture llama, head size 128), for speed runs only.

    random-gguf.py FOLDER                  dense.gguf, keep-0.39.gguf, keep-0.25.gguf in the shape of Llama-3.1-8B: 4.5 GB each
    random-gguf.py FOLDER --shape small    the same with 16 layers of 1,024: 0.1 GB each, for a CPU
    random-gguf.py FOLDER --shape tiny     two layers of the large shape and few tokens, for tests of the script
    random-gguf.py FOLDER --only keep-0.39

The budgets are not uniform: heads keep between 1/16 and everything, with the mean in the file's name. Needs numpy alone.
"""

import argparse
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

U32, F32, BOOL, STRING, ARRAY, I32 = 4, 6, 7, 8, 9, 5
TYPE_F32, TYPE_Q4_0 = 0, 2
KEEP_COUNTS = [1, 2, 4, 8, 16]
BLOCK, GROUP = 16, 512


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def key(name: str, kind: int, value: object) -> bytes:
    """One metadata entry."""
    head = text(name) + struct.pack("<I", kind)
    if kind == STRING:
        return head + text(value)
    if kind == ARRAY:
        return head + struct.pack("<IQ", I32, len(value)) + np.asarray(value, dtype="<i4").tobytes()
    return head + struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)


def configurations() -> list[list[int]]:
    """Blocks per keep count, log-Gaussian shares rounded to the 32 blocks of a group, by rising kept share."""
    rows = {}
    for mu in np.linspace(-1.0, 5.0, 61):
        share = np.exp(-((np.log2(KEEP_COUNTS) - mu) ** 2) / 2.0)
        share = share / share.sum() * (GROUP // BLOCK)
        row = np.floor(share).astype(int)
        for i in np.argsort(row - share)[: GROUP // BLOCK - row.sum()]:
            row[i] += 1
        rows.setdefault(int(row @ KEEP_COUNTS), [int(x) for x in row])
    return [rows[m] for m in sorted(rows)]


def budgets(n_heads: int, target: float) -> tuple[list[list[int]], list[int]]:
    """Configurations and one of them (or -1) for each head, with `target` as the mean kept share."""
    rng = np.random.default_rng(7)
    configs = configurations()
    kept = np.array([np.dot(row, KEEP_COUNTS) / GROUP for row in configs] + [1.0])
    wanted = np.clip(np.exp(rng.normal(np.log(target), 0.7, n_heads)), kept[0], 1.0)
    choice = np.array([np.abs(kept - w).argmin() for w in wanted])
    for _ in range(100000):
        gap = kept[choice].mean() - target
        if abs(gap) < 5e-4:
            break
        i = rng.integers(n_heads)
        choice[i] = np.clip(choice[i] + (-1 if gap > 0 else 1), 0, len(kept) - 1)
    return configs, [-1 if c == len(configs) else int(c) for c in choice]


class Shape(NamedTuple):
    n_layer: int
    n_vocab: int
    n_embd: int = 4096
    n_ff: int = 14336
    n_head: int = 32
    n_head_kv: int = 8
    head_dim: int = 128


TARGETS = {"dense": None, "keep-0.39": 0.39, "keep-0.25": 0.25}  # mean kept fraction
SHAPES = {"8b": Shape(32, 128256), "small": Shape(16, 4096, 1024, 2816, 8, 2), "tiny": Shape(2, 1024)}


def write(path: Path, target: float | None, shape: Shape, rng: np.random.Generator) -> None:
    n_layer, n_vocab, n_embd, n_ff, n_head, n_kv, dim = shape
    tensors = [("token_embd.weight", (n_embd, n_vocab)), ("output_norm.weight", (n_embd,)), ("output.weight", (n_embd, n_vocab))]
    for i in range(n_layer):
        tensors += [(f"blk.{i}.{name}.weight", shape) for name, shape in (
            ("attn_norm", (n_embd,)), ("attn_q", (n_embd, n_head * dim)), ("attn_k", (n_embd, n_kv * dim)),
            ("attn_v", (n_embd, n_kv * dim)), ("attn_output", (n_head * dim, n_embd)), ("ffn_norm", (n_embd,)),
            ("ffn_gate", (n_embd, n_ff)), ("ffn_up", (n_embd, n_ff)), ("ffn_down", (n_ff, n_embd)))]
    keys = [
        key("general.architecture", STRING, "llama"), key("general.file_type", U32, 2),
        key("llama.block_count", U32, n_layer), key("llama.context_length", U32, 262144),
        key("llama.embedding_length", U32, n_embd), key("llama.feed_forward_length", U32, n_ff),
        key("llama.attention.head_count", U32, n_head), key("llama.attention.head_count_kv", U32, n_kv),
        key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5), key("llama.rope.dimension_count", U32, dim),
        key("llama.rope.freq_base", F32, 500000.0), key("llama.vocab_size", U32, n_vocab),
        key("tokenizer.ggml.model", STRING, "no_vocab"),
    ]
    if target is not None:
        configs, heads = budgets(n_layer * n_kv, target)
        keys += [
            key("tca.version", U32, 1), key("tca.enabled", BOOL, True), key("tca.block_size", U32, BLOCK),
            key("tca.group_size", U32, GROUP), key("tca.window", U32, 496), key("tca.sinks", U32, 16),
            key("tca.metric", STRING, "key-diff"), key("tca.keep_counts", ARRAY, KEEP_COUNTS),
            key("tca.configs", ARRAY, [x for row in configs for x in row]), key("tca.head_config", ARRAY, heads),
            key("tca.kept_fraction", F32, target),
        ]
    infos, offset, sizes = b"", 0, []
    for name, shape in tensors:
        quantized = len(shape) == 2
        n = int(np.prod(shape))
        size = n // 32 * 18 if quantized else n * 4
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        infos += struct.pack("<IQ", TYPE_Q4_0 if quantized else TYPE_F32, offset)
        sizes.append((size, quantized))
        offset += (size + 31) // 32 * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + infos

    blocks = np.empty((1 << 21, 18), dtype=np.uint8)  # 36 MB of random blocks, used again and again from random places
    blocks[:, 2:] = rng.integers(0, 256, (1 << 21, 16), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.005).tobytes(), dtype=np.uint8)
    stock = blocks.tobytes()
    with open(path, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        for size, quantized in sizes:
            left = size
            if not quantized:
                file.write(np.ones(size // 4, dtype="<f4").tobytes())
                left = 0
            while left:
                at = int(rng.integers(0, 1 << 19)) * 18
                part = min(left, len(stock) - at)
                file.write(memoryview(stock)[at : at + part])
                left -= part
            file.write(b"\0" * (-size % 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--only", choices=TARGETS, help="one of the three files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else TARGETS:
        write(args.folder / f"{name}.gguf", TARGETS[name], SHAPES[args.shape], np.random.default_rng(1))


if __name__ == "__main__":
    main()
