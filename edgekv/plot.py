"""Pictures, with matplotlib (the extra ``plot``), which is loaded only when one is made."""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekv import atomic
from edgekv.errors import EdgekvError
from edgekv.extras import require
from edgekv.quality import FilterQuality

if TYPE_CHECKING:  # matplotlib is loaded when a picture is made
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edgekv.eval.report import Score

SUFFIXES = (".png", ".svg")
CELL = 0.34  # inches, of one head; smaller where a picture would become too wide
MAX_WIDTH, MAX_HEIGHT = 16.0, 7.0
MAX_NUMBERS = 200  # of heads, up to which the figures stand in the cells
DEPTHS = 10  # rows of a needle map
POINTS = 800  # of a curve, more than its width in pixels shows
# Okabe and Ito's colours for all kinds of colour vision, without the yellow, which is lost on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


def check(path: str | os.PathLike[str]) -> None:
    """Check, before the work and not after, that a picture can be written there. EdgekvError, naming --plot, if not."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise EdgekvError(f"--plot {path}: give a file that ends in {' or '.join(SUFFIXES)}")
    atomic.check(path, "--plot")
    require("plot", "matplotlib", what="--plot")


@contextmanager
def _style() -> Iterator[None]:
    """Within it the same figures give the same file: a fixed salt; and no date, see :func:`_save`."""
    from matplotlib import rc_context

    style = {"svg.hashsalt": "edgekv", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9}
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks
        yield


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(textwrap.shorten(title, 76, placeholder=" ..."), fontsize=11, parse_math=False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    out = io.BytesIO()
    kind = Path(path).suffix.lower()[1:]
    figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    atomic.write(path, [out.getvalue()])


def heat_map(quality: FilterQuality, path: str | os.PathLike[str], title: str) -> None:
    """Write the correlations of a model's filters and of K-norm, layer by KV head, as PNG or SVG by the file's name.

    Marked heads are outlined. EdgekvError if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_layers, n_heads = quality.spearman.shape
    cell = min(CELL, MAX_WIDTH / n_layers, MAX_HEIGHT / n_heads)
    width, height = max(4.6, cell * n_layers), max(0.5, cell * n_heads)
    marked = np.argwhere(quality.marked)
    heads = int(np.isfinite(quality.spearman).sum())
    panels = (("Q-Filters: projection of the key", quality.spearman),
              ("K-norm: the smaller, the better", quality.spearman_knorm))

    with _style():
        figure = Figure(figsize=(width + 2.0, 2 * height + 2.2), layout="constrained")
        _title(figure, title)
        axes = figure.subplots(2, 1, sharex=True)
        for panel, (name, values) in zip(axes, panels):
            image = panel.imshow(np.ma.masked_invalid(values.T), cmap="RdBu", vmin=-1, vmax=1, aspect="auto",
                                 interpolation="nearest")
            panel.set_facecolor("0.85")  # heads that a layer does not have
            panel.set_title(f"{name} · mean {np.nanmean(values):.2f}", loc="left")
            panel.set_ylabel("KV head")
            panel.set_yticks(_some(n_heads, cell))
            panel.set_xticks(np.arange(n_layers + 1) - 0.5, minor=True)
            panel.set_yticks(np.arange(n_heads + 1) - 0.5, minor=True)
            panel.grid(which="minor", color="white", linewidth=0.8)
            panel.tick_params(which="both", length=0)
            panel.spines[:].set_visible(False)
            if cell == CELL and n_layers * n_heads <= MAX_NUMBERS:
                for (row, head), value in np.ndenumerate(values):
                    if np.isfinite(value):
                        panel.text(row, head, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=6.5,
                                   color="white" if abs(value) > 0.6 else "black")
        ticks = _some(n_layers, cell)
        axes[1].set_xticks(ticks, [quality.layers[i] for i in ticks])
        axes[1].set_xlabel("layer")
        for row, head in marked:
            for color, line in (("white", 3.2), ("black", 1.6)):
                axes[0].add_patch(Rectangle((row - 0.44, head - 0.44), 0.88, 0.88, fill=False, ec=color, lw=line))
        if len(marked):
            note = f"outlined: {len(marked)} of {heads} heads, which their filter does not fit"
            axes[0].set_title(f"{axes[0].get_title(loc='left')}\n{note}", loc="left")
        figure.colorbar(image, ax=axes, label="rank correlation with attention", fraction=0.05, pad=0.02)
        _save(figure, path)


def _some(n: int, cell: float) -> np.ndarray:
    """Which of n cells have a label: as many as keep apart."""
    return np.arange(0, n, max(1, -(-0.24 // cell)), dtype=int)


def memory_bars(rows: Sequence[tuple[str, Mapping[str, int]]], path: str | os.PathLike[str], title: str,
                room: int | None = None, machine: str = "") -> None:
    """Write a bar per row, of the parts that it is made of in bytes, as PNG or SVG; a line at ``room`` bytes, which is
    what ``machine`` has. The parts are the same in all rows. EdgekvError if the file cannot be written."""
    check(path)
    from matplotlib.figure import Figure

    gib = 1 << 30
    parts = list(rows[0][1])
    with _style():
        figure = Figure(figsize=(8.4, 0.42 * len(rows) + 1.7), layout="constrained")
        _title(figure, title)
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        ends = np.zeros(len(rows))
        for i, part in enumerate(parts):
            sizes = np.array([found[part] / gib for _, found in rows])
            axes.barh(range(len(rows)), sizes, left=ends, color=COLOURS[i % len(COLOURS)], height=0.62, label=part)
            ends += sizes
        for y, end in enumerate(ends):
            axes.text(end, y, f" {end:.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(ends.max(), (room or 0) / gib))
        axes.set_xlabel("GiB")
        if room is not None:
            axes.axvline(room / gib, color="0.25", lw=1.2, ls="--", label=f"room on {machine}")
        figure.legend(loc="outside lower center", ncols=len(parts) + 1, frameon=False, fontsize=8)
        _save(figure, path)


# --- benchmarks ----------------------------------------------------------------------------------------------------


def bench_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str,
                 trace: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the rows of ``edgekv bench`` against the depth, a line per setting, as PNG or SVG: how fast it decodes, with
    the standard deviation, and how much memory the process took at its peak (on a GPU: dashed, by itself, because a GPU
    may share the machine's memory).

    A trace adds two panels: how fast the prompt is read, by the tokens in the context, and the memory over time; of the
    deepest context of each setting that was read and not filled with copies, in its first repetition. EdgekvError if
    nothing was decoded, or if the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    # where several lengths were decoded, the longest varies least
    decodes = [row for row in rows if row["test"].startswith("tg")]
    longest = max((_length(row) for row in decodes), default=0)
    decodes = [row for row in decodes if _length(row) == longest]
    if not decodes:
        raise EdgekvError(f"--plot {path}: needs decode speeds, give -n a number above 0")
    names = _names([*rows, *trace])
    labels = list(dict.fromkeys(map(names, decodes)))
    traced: dict[str, list[Mapping[str, Any]]] = {label: [] for label in labels}
    for label, samples in traced.items():
        own = [sample for sample in trace
               if names(sample) == label and sample["repetition"] == 1 and not sample["copied_from"]]
        deepest = max((sample["depth"] for sample in own), default=0)
        samples += [sample for sample in own if sample["depth"] == deepest]
    depths = sorted({row["depth"] for row in decodes})
    least = min((depth for depth in depths if depth), default=1)

    with _style():
        figure = Figure(figsize=(11.5, 7.6 if any(traced.values()) else 4.0), layout="constrained")
        _title(figure, title)
        panels = figure.subplots(2 if any(traced.values()) else 1, 2, squeeze=False)
        for panel in panels.flat:
            _plain_axes(panel)
        (speed, memory), *rest = panels
        for i, label in enumerate(labels):
            colour, dash, marker = _look(i)
            look = dict(color=colour, ls=dash, marker=marker, ms=5, mec="white", mew=0.6, lw=1.7, label=label)
            # what was read stands for the same depth filled with copies
            own = {row["depth"]: row for row in sorted(decodes, key=lambda row: -(row["copied_from"] or 0))
                   if names(row) == label}
            own = [own[depth] for depth in sorted(own)]
            x = [row["depth"] for row in own]
            speed.errorbar(x, [row["t_s"] for row in own], [row["t_s_sd"] for row in own], elinewidth=1, **look)
            memory.plot(x, [row["peak_rss_bytes"] / _MIB for row in own], **look)
            device = [(row["peak_device_bytes"] or 0) / _MIB for row in own]
            if any(device):
                memory.plot(x, device, **look | dict(ls="--", mfc="white", mec=colour, label=None))
            if samples := traced[label]:
                reading, over_time = rest[0]
                reading.plot(*_reading(samples), color=colour, ls=dash, lw=1.5)
                _memory(over_time, [sample["seconds"] / 60 for sample in samples], samples, colour, dash)
        for panel, text in ((speed, "decoding (tokens/s)"),
                            (memory, "peak memory (MiB)" + (", of the GPU dashed" if _on_gpu(rows) else ""))):
            panel.set_title(text, loc="left")
            panel.set_ylim(bottom=0)
            if depths[0] == 0 and depths[-1] > 8 * least:
                panel.set_xscale("symlog", base=2, linthresh=least)
            elif depths[-1] > 8 * least:
                panel.set_xscale("log", base=2)
            panel.set_xticks(depths, [_thousands(depth) for depth in depths])
            panel.minorticks_off()
            panel.set_xlabel("tokens in the context")
        for reading, over_time in rest:
            reading.set_title("reading the prompt (tokens/s)", loc="left")
            reading.set_xlabel("tokens read")
            over_time.set_title("memory (MiB)", loc="left")
            over_time.set_xlabel("minutes")
            reading.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
            reading.set_ylim(bottom=0)
            over_time.set_ylim(bottom=0)
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(labels)),
                      frameon=False)
        _save(figure, path)


def reading_curves(traces: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], title: str) -> None:
    """Write how fast a prompt is read, and the memory that the process has meanwhile, by the tokens in the context: a line
    per setting, as PNG or SVG. EdgekvError if the file cannot be written.

    Args:
        traces: samples of :class:`edgekv.meter.Trace` by the setting's name.
    """
    check(path)
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(11.5, 4.4), layout="constrained")
        _title(figure, title)
        speed, memory = panels = figure.subplots(1, 2)
        for panel, text in zip(panels, ("reading (tokens/s)", "memory of the process (MiB)")):
            _plain_axes(panel)
            panel.set_title(text, loc="left")
            panel.set_xlabel("tokens in the context")
        for i, (label, samples) in enumerate(traces.items()):
            colour, dash, _ = _look(i)
            read = _prompt(samples)
            speed.plot(*_reading(samples), color=colour, ls=dash, lw=1.5, label=label)
            _memory(memory, [sample["tokens"] for sample in read], read, colour, dash)
        for panel in panels:
            panel.set_ylim(bottom=0)
            panel.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(traces)),
                      frameon=False)
        _save(figure, path)


_MIB = 1 << 20
_READING = 64  # points of a reading curve, so that each has whole cycles of eviction in it


def _length(row: Mapping[str, Any]) -> int:
    return int(row["test"].split()[0][2:])


def _on_gpu(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["peak_device_bytes"] for row in rows)


def _names(rows: Sequence[Mapping[str, Any]]):
    """A function that names a row's setting: its policy and selection, and those flags that differ between rows."""
    flags = {"type_k": "-ctk", "type_v": "-ctv", "flash_attn": "-fa", "threads": "-t", "n_ubatch": "-ub",
             "n_gpu_layers": "-ngl", "kv_page_size": "--kv-page-size", "kv_grouped_attn": "--kv-grouped-attn",
             "rope": "RoPE"}
    differ = [field for field in flags if len({row[field] for row in rows} - {None}) > 1]

    def name(row: Mapping[str, Any]) -> str:
        parts = ["full cache" if row["kv_evict"] == "none" else f"{row['kv_evict']} {row['kv_budget']:,}"]
        if row["kv_select"] != "none":
            parts.append(f"{row['kv_select']} {row['kv_select_budget']}")
        for field in differ:
            value = row[field]
            if value is not None:
                parts.append(f"{flags[field]} {'on' if value is True else 'off' if value is False else value}")
        return ", ".join(parts)

    return name


def _prompt(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample["label"] in ("start", "prompt")]


def _memory(panel: Axes, x: Sequence[float], samples: Sequence[Mapping[str, Any]], colour: str, dash: object) -> None:
    """Resident memory, and dashed that of GPUs, of samples."""
    panel.plot(x, [sample["rss_bytes"] / _MIB for sample in samples], color=colour, ls=dash, lw=1.5)
    device = [(sample["device_bytes"] or 0) / _MIB for sample in samples]
    if any(device):
        panel.plot(x, device, color=colour, ls="--", lw=1.0)


def _reading(samples: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Tokens in the context, and tokens per second around there, of a prompt's samples."""
    read = _prompt(samples)
    step = max(1, len(read) // _READING)
    edges = read[::step]
    return ([(a["tokens"] + b["tokens"]) / 2 for a, b in zip(edges, edges[1:])],
            [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in zip(edges, edges[1:])])


# --- evaluations ---------------------------------------------------------------------------------------------------


def needle_map(scores: Sequence[Score], path: str | os.PathLike[str], title: str) -> None:
    """Write the mean score by length of the context and depth of the needle, a panel per setting, as PNG or SVG.

    Panels stand by compression, then the better first. Scores without a depth are left out; all others count, also
    those of tasks that the model cannot do. EdgekvError if none has a depth, or if the file cannot be written.
    """
    check(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scores = [s for s in scores if s.depth is not None]
    if not scores:
        raise EdgekvError(f"--plot {path}: none of these tasks has a needle at a depth of its own; drop --plot")
    lengths = sorted({s.length for s in scores})
    column = {length: i for i, length in enumerate(lengths)}
    sums: dict[str, np.ndarray] = {}
    compression: dict[str, list[float]] = {}
    for s in scores:
        cells = sums.setdefault(s.label, np.zeros((2, DEPTHS, len(lengths))))
        cells[:, min(DEPTHS - 1, int(s.depth * DEPTHS)), column[s.length]] += s.value, 1
        compression.setdefault(s.label, []).append(s.compression)
    mean = {label: total.sum() / count.sum() for label, (total, count) in sums.items()}
    smaller = {label: round(math.fsum(found) / len(found), 1) for label, found in compression.items()}
    labels = sorted(sums, key=lambda label: (smaller[label], -mean[label]))

    across = min(len(labels), 8, max(3, math.ceil(math.sqrt(1.8 * len(labels)))))
    down = math.ceil(len(labels) / across)
    numbers = len(lengths) <= 4
    wide = max(1.5, min(0.36 * len(lengths), 3.0))
    with _style():
        figure = Figure(figsize=(max(wide * across + 1.5, 5), 1.85 * down + 1.1), layout="constrained")
        _title(figure, title)
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for panel, label in zip(axes.flat, labels):
            total, count = sums[label]
            values = np.ma.masked_invalid(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
            image = panel.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_facecolor("0.85")  # no case there
            panel.set_title(f"{label}: {100 * mean[label]:.0f} %", fontsize=8, loc="left", parse_math=False)
            panel.tick_params(length=0, labelsize=7)
            panel.spines[:].set_visible(False)
            if numbers:
                for (row, i), value in np.ndenumerate(values):
                    if value is not np.ma.masked:
                        panel.text(i, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6,
                                   color="white" if value < 0.55 else "black")
        for panel in axes.flat[len(labels) :]:
            panel.set_visible(False)
        some = np.arange(0, len(lengths), math.ceil(len(lengths) / (wide / 0.34)))
        for i in range(across):
            last = axes[(len(labels) - 1 - i) // across, i]  # the lowest panel of this column
            last.tick_params(labelbottom=True)
            last.set_xticks(some, [_thousands(lengths[j]) for j in some])
        axes[0, 0].set_yticks(np.linspace(-0.5, DEPTHS - 0.5, 5), ["0", "25", "50", "75", "100"])
        figure.supxlabel("tokens of context", fontsize=9)
        figure.supylabel("depth of the needle (%)", fontsize=9)
        bar = figure.colorbar(image, ax=axes, label="answers right", fraction=0.04, pad=0.01, shrink=max(0.3, 1 / down),
                              ticks=[0, 0.25, 0.5, 0.75, 1], format=lambda share, _: f"{100 * share:.0f} %")
        bar.outline.set_visible(False)
        _save(figure, path)


def accuracy_curves(scores: Sequence[Score], path: str | os.PathLike[str], title: str, reference: str = "none",
                    floor: float = 0.6) -> None:
    """Write the pooled mean score (:class:`edgekv.eval.report.Needles` says of what) against the compression, a line
    per method with its 95 % interval as a band, as PNG or SVG. The full cache is a line across.

    Where nothing counts, because the model itself fails, the picture says so and shows no curves. EdgekvError if there
    are no scores, or if the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    from edgekv.eval.report import Needles, ratio

    needles = Needles(scores, reference, floor)
    with _style():
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        _title(figure, title)
        axes = figure.subplots()
        _plain_axes(axes)
        if not needles.counted:
            axes.text(0.5, 0.5, f"The model itself fails: with {needles.by_itself} it is right in at most\n"
                      f"{100 * floor:.0f} % of the cases of every task, which says nothing about any setting.",
                      ha="center", va="center", transform=axes.transAxes, fontsize=11, parse_math=False)
            axes.set_axis_off()
            _save(figure, path)
            return

        full = needles.pooled([reference])
        curves = {}
        for label in sorted(needles.labels, key=needles.compressions.get):
            mean = needles.pooled([label])
            if label != reference and mean is not None:
                curves.setdefault(needles.method_of[label], []).append((needles.compressions[label], mean))
        curves = {method: curves[method] for method in needles.methods if method in curves}
        xs = sorted({x for found in curves.values() for x, _ in found} or {1.0})

        axes.axhline(100 * full.mean, color="0.35", lw=1.2, zorder=1)
        axes.axhspan(100 * full.low, 100 * full.high, color="0.5", alpha=0.15, lw=0, zorder=0)
        ends = [(needles.by_itself, 1.06 * xs[-1], 100 * full.mean, "0.35", "-")]
        for i, (method, found) in enumerate(curves.items()):
            colour, dash, marker = _look(i)
            x, y, low, high = (np.array(part) for part in zip(*((x, 100 * y.mean, 100 * y.low, 100 * y.high)
                                                                for x, y in found)))
            if len(x) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.15 if len(curves) < 6 else 0.08, lw=0, zorder=2)
            else:
                axes.errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], color=colour, lw=1.2, zorder=3)
            axes.plot(x, y, color=colour, ls=dash, marker=marker, ms=5, mec="white", mew=0.6, lw=1.7, zorder=4)
            ends.append((method, x[-1], y[-1], colour, dash))
        axes.set_xscale("log", base=2)
        axes.set_xlim(xs[0] / 1.06, xs[-1] * 1.06)
        axes.set_ylim(-2, 102)
        first, last = (math.log2(x) for x in (xs[0], xs[-1]))  # x2 of an odd number of tokens is a little less or more
        ticks = [2.0**k for k in range(math.ceil(first - 0.08), math.floor(last + 0.08) + 1)]
        axes.set_xticks(ticks or xs, [ratio(tick) for tick in ticks or xs])
        axes.minorticks_off()
        axes.set_xlabel("how many times smaller the cache is")
        axes.set_ylabel("answers right (%)")
        axes.set_title("pooled over " + textwrap.shorten(", ".join(map(str, needles.counted)), 90, placeholder=" ..."),
                       loc="left", color="0.25", parse_math=False)
        _label_ends(axes, ends)
        _save(figure, path)


def loss_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | os.PathLike[str], title: str,
                reference: str = "none", smooth: int | None = None) -> None:
    """Write loss against position, and below it the difference to the curve named ``reference``, as PNG or SVG.

    Args:
        curves: label -> (positions, increasing; loss at each, nats per token).
        smooth: each point is the mean of so many losses up to it; 1 for losses that are means already. By default a
            twentieth of the longest curve.

    Raises:
        EdgekvError: there is no curve, or the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    if not curves or not all(len(loss) for _, loss in curves.values()):
        raise EdgekvError(f"--plot {path}: there are no losses to plot yet; let the evaluation run on")
    if smooth is None:
        smooth = max(1, max(len(loss) for _, loss in curves.values()) // 20)
    found = {}
    for label, (positions, loss) in curves.items():
        x, y = np.asarray(positions, np.float64), np.asarray(loss, np.float64)
        n = min(smooth, len(y))
        sums = np.concatenate([[0], np.cumsum(y)])
        found[label] = x[n - 1 :], (sums[n:] - sums[:-n]) / n
    full = found.get(reference)
    others = [label for label in found if label != reference]
    look = {label: _look(i) for i, label in enumerate(others)} | {reference: ("0.35", "-", "")}

    with _style():
        figure = Figure(figsize=(8.4, 7.2 if full else 4.4), layout="constrained")
        _title(figure, title)
        panels = figure.subplots(2 if full else 1, 1, sharex=True, squeeze=False)[:, 0]
        for panel in panels:
            _plain_axes(panel)
        for i, panel in enumerate(panels):
            ends = []
            for label in others if i else found:
                x, y = found[label]
                if i:
                    x, at, at_full = np.intersect1d(x, full[0], return_indices=True)
                    y = y[at] - full[1][at_full]
                    if not len(x):
                        continue
                colour, dash, _ = look[label]
                some = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS), dtype=int))
                panel.plot(x[some], y[some], color=colour, ls=dash, lw=1.3, zorder=3 if label == reference else 2)
                ends.append((label, x[-1], y[-1], colour, dash))
            panel.margins(x=0.01)
            _label_ends(panel, ends)
        panels[0].set_ylabel("loss (nats per token)")
        panels[0].set_title(f"mean of the last {smooth} tokens" if smooth > 1 else "", loc="left", color="0.25")
        if full:
            panels[1].axhline(0, color=look[reference][0], lw=1)
            panels[1].set_ylabel(f"difference to {reference} (nats)", parse_math=False)
        panels[-1].set_xlabel("position in the text (tokens)")
        _save(figure, path)


def _look(i: int) -> tuple[str, object, str]:
    """Colour, dashes and marker of the i-th line: no two of the first 21 have both colour and dashes in common."""
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)]


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str, object]]) -> None:
    """Name lines (label, x and y of the end, colour, dashes) in the right margin, apart from each other, each name
    joined to its line."""
    height = axes.get_position().height * axes.figure.get_figheight()
    apart = 0.15 / max(height, 1.0)  # of a line of text, as a share of the axes
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # it stays
    left, right = axes.get_xlim()
    log = axes.get_xscale() == "log"
    ends = sorted(ends, key=lambda end: end[2])
    places = _spread([(end[2] - low) / (high - low) for end in ends], apart)
    for (label, x, y, colour, dash), place in zip(ends, places):
        share = math.log(x / left) / math.log(right / left) if log else (x - left) / (right - left)
        start = (share, (y - low) / (high - low))
        axes.plot([start[0], 1.03], [start[1], place], color=colour, lw=0.6, ls=":", alpha=0.8,
                  transform=axes.transAxes, clip_on=False, zorder=1)
        axes.plot([1.03, 1.07], [place, place], color=colour, lw=1.6, ls=dash, transform=axes.transAxes, clip_on=False)
        axes.text(1.08, place, label, color=colour, fontsize=8, va="center", transform=axes.transAxes, parse_math=False)


def _spread(places: Sequence[float], apart: float) -> list[float]:
    """Increasing ``places`` moved until they are ``apart``, as little as can be in the square mean, and within 0 and
    1 if they fit."""
    groups: list[tuple[float, int]] = []  # where names that touch would be without the distances, and how many they are
    for i, place in enumerate(places):
        at, n = place - i * apart, 1
        while groups and groups[-1][0] > at:
            before, m = groups.pop()
            at, n = (before * m + at * n) / (m + n), m + n
        groups.append((at, n))
    most = max(0.0, 1 - (len(places) - 1) * apart)
    flat = [min(max(at, 0.0), most) for at, n in groups for _ in range(n)]
    return [at + i * apart for i, at in enumerate(flat)]


def _thousands(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"
