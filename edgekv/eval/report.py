"""What the evaluations found, as tables: Markdown for people, JSON and CSV for programs.

All figures are computed from a plain list of scores, so a table can be made again from a journal at any time.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgekv.errors import EdgekvError
from edgekv.eval.stats import Interval, Paired, balanced, mean_interval, paired
from edgekv.table import markdown, plain, to_csv, to_json

FORMATS = ("md", "json", "csv")

# heading, key of the row, value -> text, right-aligned; a value that is None or not there is a dash
Column = tuple[str, str, Callable[[Any], str], bool]


@dataclass(frozen=True)
class Score:
    """One answer: ``value`` in [0, 1] is how much of it was right.

    ``label`` names the setting (``qfilters x4``), ``method`` its family (``qfilters``), ``compression`` how many times
    smaller the cache was. ``length`` counts tokens; ``depth`` in [0, 1] is where the needle was, None if nowhere in
    particular.
    """

    document: str
    length: int
    task: str
    depth: float | None
    label: str
    method: str
    compression: float
    value: float


@dataclass(frozen=True)
class Cell:
    """A task at a length: how well the reference does there (None: no case yet), and whether it is counted."""

    task: str
    length: int
    reference: Interval | None
    counted: bool

    def __str__(self) -> str:
        return f"{self.task} {self.length}"


class Needles:
    """Scores, and everything the tables and pictures say about them.

    A task is counted, per length, where the mean of the setting ``reference`` (a label) is above ``floor``: what the
    model cannot do with its full cache says nothing about a policy. In pooled means each counted task and length counts
    the same; clusters are documents.

    Attributes: ``scores``, ``reference``, ``floor``, ``cells`` (a :class:`Cell` per task and length), ``labels`` and
    ``methods`` (in the order in which they first came).

    Raises:
        EdgekvError: there is no score, or none of the reference.
    """

    def __init__(self, scores: Iterable[Score], reference: str = "none", floor: float = 0.6):
        self.scores, self.reference, self.floor = list(scores), reference, floor
        self.labels = dict.fromkeys(s.label for s in self.scores)
        self.methods = dict.fromkeys(s.method for s in self.scores)
        if not self.scores:
            raise EdgekvError("there is no case to report yet; let the evaluation run on")
        if reference not in self.labels:
            raise EdgekvError(f"there is no case of the setting {reference!r}, with which all others are compared; let "
                              "the evaluation run on")
        self._found: dict[tuple[str, str, int], list[Score]] = defaultdict(list)
        for s in self.scores:
            self._found[s.label, s.task, s.length].append(s)
        tasks = list(dict.fromkeys(s.task for s in self.scores))
        self.cells = []
        asked = {(s.task, s.length) for s in self.scores}
        for task, length in sorted(asked, key=lambda at: (tasks.index(at[0]), at[1])):
            interval = self.at(reference, task, length)
            self.cells.append(Cell(task, length, interval, interval is not None and interval.mean > floor))

    @property
    def by_itself(self) -> str:
        """The reference, in words."""
        return "the full cache" if self.reference == "none" else self.reference

    @property
    def counted(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.counted]

    @cached_property
    def _counted(self) -> set[tuple[str, int]]:
        return {(cell.task, cell.length) for cell in self.counted}

    @cached_property
    def _strata(self) -> dict[str, frozenset[tuple[str, int]]]:
        """What is asked of each document. A resample then has as many documents of each kind as there were."""
        asked = defaultdict(set)
        for s in self.scores:
            if (s.task, s.length) in self._counted:
                asked[s.document].add((s.task, s.length))
        return {document: frozenset(cells) for document, cells in asked.items()}

    @cached_property
    def compressions(self) -> dict[str, float]:
        """Of each label: the mean, as lengths may differ a little."""
        found = defaultdict(list)
        for s in self.scores:
            found[s.label].append(s.compression)
        return {label: math.fsum(c) / len(c) for label, c in found.items()}

    @cached_property
    def method_of(self) -> dict[str, str]:
        return {s.label: s.method for s in self.scores}

    def at(self, label: str, task: str, length: int) -> Interval | None:
        """Mean of one setting in one task; None without a case."""
        found = self._found.get((label, task, length))
        return _interval(found) if found else None

    def _counted_of(self, labels: Iterable[str]) -> list[Score]:
        return [s for label in labels for cell in self.counted
                for s in self._found.get((label, cell.task, cell.length), ())]

    def pooled(self, labels: Iterable[str]) -> Interval | None:
        """Mean over the counted tasks of one setting, or over several settings of one method; None if nothing counts.
        """
        found = self._counted_of(labels)
        return _interval(found, self._strata) if found else None

    def compare(self, labels: Iterable[str], with_labels: Iterable[str], same: bool = True) -> Paired | None:
        """The same, paired, against another setting or method, on the cases that both have; ``same``: at the same
        compression. None if there are none."""
        ours = list(_cases(self._counted_of(labels)))
        theirs = {_at(s, number, same): s for s, number in _cases(self._counted_of(with_labels))}
        pairs = [(s, theirs[_at(s, number, same)]) for s, number in ours if _at(s, number, same) in theirs]
        if not pairs:
            return None
        return paired([a.value for a, _ in pairs], [b.value for _, b in pairs], [a.document for a, _ in pairs],
                      weights=balanced([(a.label, a.task, a.length) for a, _ in pairs]),
                      strata=[self._strata[a.document] for a, _ in pairs])

    def known(self, against: str | None) -> None:
        """EdgekvError if there is no such label or method."""
        if against is not None and against not in self.labels and against not in self.methods:
            raise EdgekvError(f"--against {against}: there is no such method; choose one of {', '.join(self.methods)}")

    def opponent(self, label: str, against: str) -> str | None:
        """The setting that ``label`` is compared with: the label ``against``, or that of the method ``against`` with
        the same compression; None if there is none but itself."""
        if against in self.labels:
            return None if label == against else against
        mine = _same(self.compressions[label])
        return next((other for other in self.labels if self.method_of[other] == against != self.method_of[label]
                     and _same(self.compressions[other]) == mine), None)

    def rows(self, against: str | None = None) -> list[dict[str, Any]]:
        """One row per setting, by compression, then the better first; see :func:`needle_rows`."""
        self.known(against)
        numbers = Counter(s.label for s in self.scores)
        rows = []
        for label in self.labels:
            tasks = [{"task": cell.task, "length": cell.length, "counted": cell.counted,
                      **_figures(self.at(label, cell.task, cell.length))} for cell in self.cells]
            row = {"label": label, "method": self.method_of[label], "compression": self.compressions[label],
                   "cases": numbers[label], **_figures(self.pooled([label]))}
            if against is not None:
                other = self.opponent(label, against)
                row |= {"against": other, **_differences(self.compare([label], [other], same=False) if other else None)}
            rows.append(row | {"tasks": tasks})
        return sorted(rows, key=lambda row: (_same(row["compression"]), -(row["mean"] or 0)))

    def method_rows(self, against: str | None = None) -> list[dict[str, Any]]:
        """One row per method, over all its compressions, the better first. A difference is over the compressions that
        the method shares with ``against``; where that is a setting and a method at once, such as ``none``, over all."""
        self.known(against)
        of = {method: [label for label in self.labels if self.method_of[label] == method] for method in self.methods}
        rows = []
        for method, labels in of.items():
            row = {"method": method, "compressions": sorted({_same(self.compressions[label]) for label in labels}),
                   **_figures(self.pooled(labels))}
            if against is not None:
                other = self.method_of.get(against, against)
                test = None if method == other else self.compare(labels, of[other], same=other not in self.labels)
                row |= {"against": other if test else None, **_differences(test)}
            rows.append(row)
        return sorted(rows, key=lambda row: -(row["mean"] or 0))


def needle_rows(scores: Iterable[Score], reference: str = "none", floor: float = 0.6,
                against: str | None = None) -> list[dict[str, Any]]:
    """One row per setting, by compression, then the better first.

    Keys: label, method, compression, cases (their number); mean, low, high, documents: pooled over what is counted,
    None where nothing is (:class:`Needles` says what is); tasks: the same per task and length, with ``counted``. With
    ``against`` (a label, or a method: then its setting with the same compression) also against, difference,
    difference_low, difference_high, p, better, worse: a paired test over documents, None without an opponent.
    """
    return Needles(scores, reference, floor).rows(against)


def needle_report(scores: Iterable[Score], fmt: str = "md", *, header: Mapping[str, Any] | None = None,
                  reference: str = "none", floor: float = 0.6, against: str | None = None) -> str:
    """The whole report of an evaluation with needles.

    ``md``: a table of settings and, where there is more than one compression, one of methods; notes below.
    ``json``: an object of header, floor, settings and methods (:meth:`Needles.rows`, :meth:`Needles.method_rows`).
    ``csv``: a line per setting and task; the task ``pooled`` is over what is counted, with the paired test.
    """
    needles = Needles(scores, reference, floor)
    rows, methods = needles.rows(against), needles.method_rows(against)
    if fmt == "json":
        return to_json({"header": header, "reference": reference, "floor": floor, "settings": rows, "methods": methods})
    if fmt == "csv":
        return to_csv(_long(rows))
    parts = [_settings_table(needles, rows, against)]
    if needles.counted and any(len(row["compressions"]) > 1 for row in methods):
        other = needles.method_of.get(against, against)
        parts.append("Over all compressions of a method:\n\n" + _methods_table(methods, other))
    parts.append("\n".join(_notes(needles, rows, against)) + "\n")
    if header:
        parts.append(footer(header))
    return "\n".join(parts)


def loss_report(rows: Sequence[Mapping[str, Any]], fmt: str = "md", *, header: Mapping[str, Any] | None = None,
                curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None) -> str:
    """Rows of :func:`edgekv.eval.perplexity.rows`. ``json``: an object of header, settings and, by label, curves
    (positions; mean loss of the block that begins there)."""
    known = {label: {"position": x, "loss": y} for label, (x, y) in (curves or {}).items()}
    columns: list[Column] = [
        ("setting", "setting", str, False), ("ppl", "ppl", _digits(3), True), ("loss", "loss", _digits(4), True),
        ("added", "added", _signed, True), ("added behind", "added_behind", _signed, True),
        ("removed", "removed_share", percent, True), ("cells", "cells_used", str, True),
        ("KV MiB", "kv_bytes", _mib, True)]
    notes = ["Loss in nats per token, and what a setting adds to that of the full cache, with 95 % intervals "
             "(bootstrap over blocks of 64 tokens)."]
    if any(row["behind"] is not None for row in rows):
        notes.append("Behind: where every query sees an evicted cache, from position "
                     f"{_range(row['behind'] for row in rows)} on.")
    if any(row["removed_share"] is not None for row in rows):
        notes.append("Removed: how much of the loss that StreamingLLM adds with the same budget is not added (per "
                     "cent).")
    return _losses(rows, columns, ("added", "added_behind", "removed_share"), notes, fmt, header, {"curves": known})


def divergence_report(rows: Sequence[Mapping[str, Any]], fmt: str = "md", *,
                      header: Mapping[str, Any] | None = None) -> str:
    """Rows of :func:`edgekv.eval.divergence.rows`, under the names of llama-perplexity. ``json``: an object of header
    and settings."""
    def share(value: float) -> str:
        return f"{100 * value:.2f}"

    def same(interval: Mapping[str, Any]) -> str:
        return _interval_text({name: None if value is None else 100 * value for name, value in interval.items()}, ".1f")

    columns: list[Column] = [
        ("setting", "setting", str, False), ("Mean KLD", "kld_mean", _interval_text, True),
        ("behind", "behind_kld_mean", _interval_text, True), ("Median KLD", "kld_median", _digits(4), True),
        ("99.0% KLD", "kld_99", _digits(3), True), ("Maximum KLD", "kld_max", _digits(2), True),
        ("Same top p", "same_top", same, True), ("behind", "behind_same_top", same, True),
        ("Mean Δp", "delta_p_mean", share, True), ("RMS Δp", "delta_p_rms", share, True),
        ("Mean PPL(Q)", "ppl", _digits(3), True), ("cells", "cells_used", str, True),
        ("KV MiB", "kv_bytes", _mib, True)]
    notes = ["KL divergence (nats) from the predictions with the full f16 cache, share of positions where both have "
             "the same token on top and change of the true token's probability (per cent); 95 % intervals (bootstrap "
             f"over blocks of 64 tokens). Mean PPL(base): {rows[0]['ppl_base']:.3f}."]
    if any(row["behind"] is not None for row in rows):
        notes.append("Behind: where every query sees an evicted cache, from position "
                     f"{_range(row['behind'] for row in rows)} on.")
    with_ends = ("kld_mean", "behind_kld_mean", "same_top", "behind_same_top")
    return _losses(rows, columns, with_ends, notes, fmt, header, {})


def recall_report(report: Mapping[str, Any], fmt: str = "md", *, header: Mapping[str, Any] | None = None) -> str:
    """``RecallReport.as_dict()``. ``json``: the same with the header; ``csv``: a line per setting."""
    if fmt == "json":
        return to_json({"header": header, **report})
    rows = [{name: row[name] for name in ("setting", "kind", "tokens", "part")} | row["mean"]
            | {"least": row["least"]["held"], "least_layer": row["least_held_in"][0],
               "least_head": row["least_held_in"][1]} for row in report["settings"]]
    if fmt == "csv":
        return to_csv(rows)

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    names = ("held", "best", "top", "random", "window")
    columns: list[Column] = [
        ("setting", "setting", str, False), ("tokens", "tokens", _digits(0), True), ("part", "part", share, True),
        *((name, name, share, True) for name in names if any(name in row for row in rows)),
        ("least held", "least", share, True), ("in layer, head", "where", str, True)]
    shown = [row | {"where": f"{row['least_layer']}, {row['least_head']}"} for row in rows]
    texts = ", ".join(f"{text['n_prompt']} tokens of {text['text']}" for text in report["texts"])
    weighed = ", weighed with the norm of V" if report["values"] else ""
    notes = [f"Per cent of the attention of {report['n_steps']} decode steps{weighed}, behind {texts}; means over KV "
             "heads."]
    if any(row["kind"] == "eviction" for row in rows):
        notes.append("Evictions: of the attention to the prompt, what is held by the tokens that stay; best: by the "
                     "best choice with the same sinks and window; top: by the best of all; random: by the same sinks "
                     "and window and chance; window: by the sinks and the last tokens. "
                     f"{share(report['prompt'])} % of all attention goes to the prompt.")
    if any(row["kind"] == "selection" for row in rows):
        notes.append("Selections: of all attention, what is held by the pages that are read; best: by the best as "
                     "many; window: by the first page and the newest.")
    return _tables(table(shown, columns), notes, header)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], fmt: str = "md") -> str:
    """Rows as a table. ``md`` shows the columns; ``json`` and ``csv`` have all that the rows hold, unformatted."""
    if fmt == "json":
        return to_json(list(rows))
    if fmt == "csv":
        return to_csv(rows)
    return markdown((heading, [_text(row.get(key), text) for row in rows], right)
                    for heading, key, text, right in columns)


def footer(header: Mapping[str, Any]) -> str:
    """Model, versions and machine of a journal's header, in one line."""
    model, versions, machine = header["model"], header["versions"], header["machine"]
    return (f"{model['file']} ({model['architecture']}, sha256 {model['sha256'][:12]}); edgekv {versions['edgekv']}, "
            f"llama-cpp-python {versions['llama_cpp_python']}, {machine['cpu_variant']}; {machine['name']}, "
            f"{machine['threads']} threads; {header['started']}\n")


def percent(interval: Mapping[str, Any] | Interval) -> str:
    """``72 [64, 79]``: per cent, with the interval if there is one."""
    if isinstance(interval, Interval):
        interval = _figures(interval)
    if interval["mean"] is None:
        return "-"
    if interval["low"] is None:
        return f"{_hundred(interval['mean'])}"
    return f"{_hundred(interval['mean'])} [{_hundred(interval['low'])}, {_hundred(interval['high'])}]"


def ratio(compression: float) -> str:
    """``x4``, ``x3.6``."""
    return f"x{compression:.1f}".removesuffix(".0")


def p_value(p: float) -> str:
    """``0.03``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


# --- inside --------------------------------------------------------------------------------------------------------


def _interval(scores: Sequence[Score], strata: Mapping[str, Hashable] | None = None) -> Interval:
    """Each task, length and setting counts the same."""
    return mean_interval([s.value for s in scores], [s.document for s in scores],
                         weights=balanced([(s.label, s.task, s.length) for s in scores]),
                         strata=None if strata is None else [strata[s.document] for s in scores])


def _same(compression: float) -> float:
    """Compressions that agree in this are the same one."""
    return round(compression, 1)


def _cases(scores: Iterable[Score]) -> Iterable[tuple[Score, int]]:
    """Numbers questions that are alike in all else. Which one gets which number does not matter: the differences in
    a document are added up."""
    seen: dict[tuple, int] = defaultdict(int)
    for s in scores:
        alike = s.label, s.task, s.length, s.document, s.depth
        yield s, seen[alike]
        seen[alike] += 1


def _at(s: Score, number: int, same: bool) -> tuple:
    """What two answers that are compared have in common."""
    return s.task, s.length, s.document, s.depth, number, _same(s.compression) if same else None


def _figures(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"mean": None, "low": None, "high": None, "documents": 0}
    return {"mean": interval.mean, "low": plain(interval.low), "high": plain(interval.high), "documents": interval.n}


def _differences(test: Paired | None) -> dict[str, Any]:
    names = {"difference": "difference", "difference_low": "low", "difference_high": "high", "p": "p",
             "better": "better", "worse": "worse"}
    return {name: None if test is None else plain(getattr(test, field)) for name, field in names.items()}


def _long(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for row in rows:
        setting = {name: row[name] for name in ("label", "method", "compression")}
        lines += [setting | task for task in row["tasks"]]
        figures = {name: value for name, value in row.items() if name not in setting and name not in ("tasks", "cases")}
        lines.append(setting | {"task": "pooled", "length": None, "counted": None} | figures)
    return lines


def _settings_table(needles: Needles, rows: Sequence[Mapping[str, Any]], against: str | None) -> str:
    shown = [row | {"pooled": row, "test": row} | {str(cell): task for cell, task in zip(needles.cells, row["tasks"])}
             for row in rows]
    columns: list[Column] = [("setting", "label", str, False), ("compression", "compression", ratio, True)]
    if needles.counted:
        columns.append(("pooled", "pooled", percent, True))
        if against is not None:
            columns += _test_columns(against)
    columns += [(str(cell) if cell.counted else f"({cell})", str(cell), percent, True) for cell in needles.cells]
    return table(shown, columns)


def _methods_table(rows: Sequence[Mapping[str, Any]], against: str | None) -> str:
    columns: list[Column] = [("method", "method", str, False),
                             ("compression", "compressions", lambda found: ", ".join(map(ratio, found)), False),
                             ("pooled", "pooled", percent, True)]
    if against is not None:
        columns += _test_columns(against)
    return table([row | {"pooled": row, "test": row} for row in rows], columns)


def _test_columns(against: str) -> list[Column]:
    return [(f"against {against}", "test", _difference, True), ("p", "p", p_value, True),
            ("better, worse", "test", _better_worse, True)]


def _better_worse(row: Mapping[str, Any]) -> str:
    return "-" if row["p"] is None else f"{row['better']}, {row['worse']}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "-"
    signed = [f"{_hundred(row[name]):+d}" if row[name] is not None else None
              for name in ("difference", "difference_low", "difference_high")]
    return signed[0] if signed[1] is None else f"{signed[0]} [{signed[1]}, {signed[2]}]"


def _notes(needles: Needles, rows: Sequence[Mapping[str, Any]], against: str | None) -> list[str]:
    notes = []
    least = f"{_hundred(needles.floor)} %"
    if not needles.counted:
        notes.append(f"The model itself fails: with {needles.by_itself} it is right in at most {least} of the cases of "
                     "every task. This says nothing about any setting, so there is no ranking; take a larger model or "
                     "shorter contexts.")
    numbers = sorted({row["documents"] for row in rows} - {0} or {len({s.document for s in needles.scores})})
    documents = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    notes.append("Per cent of the answers that are right, with 95 % intervals (bootstrap over documents, "
                 f"{documents} of them)"
                 + ("; pooled: each task and length counts the same." if needles.counted else "."))
    floored = [str(cell) for cell in needles.cells if cell.reference is not None and not cell.counted]
    if needles.counted and floored:
        notes.append(f"In brackets, at the floor of the model and not in the pooled mean: {', '.join(floored)}. The "
                     f"model itself fails at it: with {needles.by_itself} it is right in at most {least}.")
    if missing := [str(cell) for cell in needles.cells if cell.reference is None]:
        notes.append(f"In brackets and not in the pooled mean, as {needles.by_itself} has no case of it yet: "
                     f"{', '.join(missing)}.")
    if any(task["low"] is not None and task["low"] == task["high"] for row in rows for task in row["tasks"]):
        notes.append("An interval without width means that all answers were alike, not that they are certain.")
    if needles.counted and against is not None:
        notes.append("p: sign flips over documents, two-sided, of the mean difference in points on the same cases; not "
                     "corrected for the number of comparisons.")
    if len({row["cases"] for row in rows}) > 1:
        fewest, most = min(rows, key=lambda row: row["cases"]), max(row["cases"] for row in rows)
        notes.append(f"Settings have different numbers of cases ({fewest['label']} {fewest['cases']}, others up to "
                     f"{most}): only the paired differences compare like with like.")
    return notes


def _losses(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], with_ends: Sequence[str],
            notes: Sequence[str], fmt: str, header: Mapping[str, Any] | None, more: Mapping[str, Any]) -> str:
    """``with_ends``: values that have a lower and an upper end beside them. Columns without any value are not shown."""
    if fmt == "json":
        return to_json({"header": header, "settings": rows, **more})
    if fmt == "csv":
        return to_csv(rows)
    shown = [row | {name: None if row[name] is None else
                    {"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]} for name in with_ends}
             for row in rows]
    columns = [column for column in columns if any(row[column[1]] is not None for row in shown)]
    return _tables(table(shown, columns), notes, header)


def _tables(text: str, notes: Sequence[str], header: Mapping[str, Any] | None) -> str:
    return "\n".join([text, "\n".join(notes) + "\n", *([footer(header)] if header else [])])


def _digits(n: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{n}f}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 1024**2:.1f}"


def _interval_text(interval: Mapping[str, Any], form: str = ".3f") -> str:
    """``0.123 [0.101, 0.145]``."""
    mean, low, high = (None if interval[name] is None else format(interval[name], form)
                       for name in ("mean", "low", "high"))
    return mean if low is None else f"{mean} [{low}, {high}]"


def _signed(interval: Mapping[str, Any]) -> str:
    return _interval_text(interval, "+.3f")


def _range(positions: Iterable[int | None]) -> str:
    found = sorted({position for position in positions if position is not None})
    return " or ".join(map(str, found)) if len(found) < 4 else f"{found[0]} to {found[-1]}"


def _hundred(share: float) -> int:
    return round(100 * share)


def _text(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if plain(value) is None else text(value)
