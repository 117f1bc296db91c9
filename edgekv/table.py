"""Rows of figures as text: Markdown for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(columns: Iterable[tuple[str, Sequence[str], bool]]) -> str:
    """Columns of as many cells each: heading, cells, whether they are right-aligned."""
    laid_out = []
    for heading, cells, right in columns:
        cells = [cell.replace("|", "\\|") for cell in cells]
        width = max(map(len, [heading, *cells]))
        rule = "-" * (width - 1) + ":" if right else "-" * width
        laid_out.append([cell.rjust(width) if right else cell.ljust(width) for cell in (heading, rule, *cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*laid_out))


def to_json(value: Any) -> str:
    return json.dumps(plain(value), indent=2) + "\n"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Empty fields for null, 1 and 0 for true and false, spaces between the numbers of a list."""
    def field(value: Any) -> Any:
        value = plain(value)
        if isinstance(value, bool):
            return int(value)
        return " ".join(map(str, value)) if isinstance(value, list) else value

    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: field(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def plain(value: Any) -> Any:
    """Without what JSON lacks: NumPy's types, and numbers that are not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
