"""Draws the records of `edgekv bench` again: the picture in the README.

    python benchmarks/figure.py RECORD.json ... [--trace FILE.csv ...] [--title TEXT] -o FILE.svg

Rows of several records are one picture; each is what `edgekv bench ... -o json` printed, each trace what `--trace` wrote.
Where a depth was measured twice, once read and once filled with copies, the one that was read is drawn.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from edgekv import plot
from edgekv.errors import EdgekvError

_NUMBERS = ("threads", "n_gpu_layers", "n_ubatch", "kv_budget", "kv_window", "keep", "kv_page_size", "kv_dense_layers",
            "depth", "copied_from", "repetition", "tokens", "cells", "rss_bytes", "device_bytes")
_LATER = {"rope": None, "copied_from": None, "peak_device_bytes": None}  # what older records lack
_SWITCHES = ("flash_attn", "kv_grouped_attn")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The samples of a trace, with the types that they had."""
    def value(name: str, text: str) -> Any:
        if text == "":
            return None
        if name in _SWITCHES:
            return text == "1"
        if name == "kv_select_budget":
            return int(text) if text.isdigit() else text
        return int(text) if name in _NUMBERS else float(text) if name == "seconds" else text

    with open(path, newline="") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--trace", nargs="*", type=Path, default=[])
    parser.add_argument("--title")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    try:
        rows = [{**_LATER, **row} for path in args.records for row in json.loads(path.read_text())]
        samples = [sample for path in args.trace for sample in read_trace(path)]
    except (OSError, ValueError, TypeError) as error:
        raise EdgekvError(f"{error}: give what edgekv bench -o json and --trace wrote") from None
    if not rows:
        raise EdgekvError(f"{args.records[0]}: there is no row in it")
    plot.bench_curves(rows, args.output, args.title or f"{rows[0]['model']}: {rows[0]['machine']}", samples)


if __name__ == "__main__":
    try:
        main()
    except EdgekvError as error:
        sys.exit(f"figure.py: {error}")
