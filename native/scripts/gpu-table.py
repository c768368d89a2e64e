#!/usr/bin/env python3
"""Prints what tca-bench-gpu measured (lines of JSON on stdin) as one table, stock beside TCA, with ratios against stock f16.

Rows of one model and KV type that were measured more than once (other micro-batch sizes): the fastest counts, for stock too.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    rows: dict[tuple[str, str, int], dict] = {}
    for line in sys.stdin:
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        name = Path(row["model"]).stem if row["tca"] else "stock"
        best = rows.setdefault((name, row["kv"], row["depth"]), row)
        for field in ("prompt_tps", "decode_tps"):
            best[field] = max(best[field], row[field])
    if not rows:
        sys.exit("no measurements on stdin")
    print(f"{'':12} {'KV':5} {'depth':>7} {'prompt t/s':>11} {'x stock f16':>11} {'decode t/s':>11} {'x stock f16':>11} {'x stock same':>12} "
          f"{'KV GB (driver)':>14} {'x stock f16':>11}")
    for (name, kv, depth), row in sorted(rows.items(), key=lambda item: (item[0][2], item[0][0] != "stock", item[0])):
        def ratio(field: str, other: tuple[str, str, int]) -> str:
            return f"{row[field] / rows[other][field]:.2f}" if other in rows else "-"
        f16, same = ("stock", "f16", depth), ("stock", kv, depth)
        print(f"{name:12} {kv:5} {depth:7} {row['prompt_tps']:11.0f} {ratio('prompt_tps', f16):>11} {row['decode_tps']:11.1f} "
              f"{ratio('decode_tps', f16):>11} {ratio('decode_tps', same):>12} {row['kv_driver'] / 1e9:14.2f} {ratio('kv_driver', f16):>11}")


if __name__ == "__main__":
    main()
