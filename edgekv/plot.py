"""Pictures, with matplotlib (the extra ``plot``), which is loaded only when one is made."""

from __future__ import annotations

import io
import os
import textwrap
import warnings
from pathlib import Path

import numpy as np

from edgekv import atomic
from edgekv.errors import EdgekvError
from edgekv.extras import require
from edgekv.quality import FilterQuality

SUFFIXES = (".png", ".svg")
CELL = 0.34  # inches, of one head; smaller where a picture would become too wide
MAX_WIDTH, MAX_HEIGHT = 16.0, 7.0
MAX_NUMBERS = 200  # of heads, up to which the figures stand in the cells


def check(path: str | os.PathLike[str]) -> None:
    """Check, before the work and not after, that a picture can be written there. EdgekvError, naming --plot, if not."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise EdgekvError(f"--plot {path}: give a file that ends in {' or '.join(SUFFIXES)}")
    folder = path.resolve().parent
    if path.is_dir():
        raise EdgekvError(f"--plot {path}: is a folder; name a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EdgekvError(f"--plot {path}: {folder} is no folder that can be written to")
    require("plot", "matplotlib", what="--plot")


def heat_map(quality: FilterQuality, path: str | os.PathLike[str], title: str) -> None:
    """Write the correlations of a model's filters and of K-norm, layer by KV head, as PNG or SVG by the file's name.

    Marked heads are outlined. EdgekvError if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_layers, n_heads = quality.spearman.shape
    cell = min(CELL, MAX_WIDTH / n_layers, MAX_HEIGHT / n_heads)
    width, height = max(4.6, cell * n_layers), max(0.5, cell * n_heads)
    marked = np.argwhere(quality.marked)
    heads = int(np.isfinite(quality.spearman).sum())
    panels = (("Q-Filters: projection of the key", quality.spearman),
              ("K-norm: the smaller, the better", quality.spearman_knorm))

    # a fixed salt and no date: the same figures give the same file
    style = {"svg.hashsalt": "edgekv", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9}
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks
        figure = Figure(figsize=(width + 2.0, 2 * height + 2.2), layout="constrained")
        figure.suptitle(textwrap.shorten(title, 76, placeholder=" ..."), fontsize=11, parse_math=False)
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
        out = io.BytesIO()
        kind = Path(path).suffix.lower()[1:]
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    atomic.write(path, [out.getvalue()])


def _some(n: int, cell: float) -> np.ndarray:
    """Which of n cells have a label: as many as keep apart."""
    return np.arange(0, n, max(1, -(-0.24 // cell)), dtype=int)
