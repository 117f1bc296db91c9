"""Q-Filters of a GGUF model from its own queries (arXiv 2503.02812, section 3), without torch.

The patched runtime hands over the post-RoPE queries while it reads text and keeps, per query head, the sum of their
outer products: one matrix, however long the text. The filter is that matrix' top eigenvector.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from edgekv import _runtime, native, quality
from edgekv.attention import Score
from edgekv.errors import EdgekvError
from edgekv.convert import save_filters
from edgekv.filters import QFilters, from_moments, join_reports, model_fingerprint, read
from edgekv.gguf_file import GGUF
from edgekv.pull import cache_dir
from edgekv.session import Session, Vocabulary

MIN_QUERIES = 3000  # per head; the paper finds more to change little
N_SEQUENCES = 3
SEQUENCE_TOKENS = 2048
HELD_OUT_TOKENS = 1088  # read afterwards, for the report


def default_text() -> str:
    """English prose that every Python installation has: the help topics of the language. No network is needed."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibrate(
    path: str | os.PathLike[str],
    *,
    text_files: Iterable[str | os.PathLike[str]] = (),
    n_threads: int | None = None,
    progress: bool = False,
) -> QFilters:
    """Filters of a model, one vector per cache layer and KV head.

    Reads at most ``N_SEQUENCES`` sequences of ``SEQUENCE_TOKENS`` tokens, spread over the text. The same text, threads
    and CPU variant give the same bytes.

    The report's correlations (see :mod:`edgekv.filters`) come from ``HELD_OUT_TOKENS`` tokens of the same text that
    were not read before, from the middle between the first two sequences. They are left out if the text has too few
    there, or if the model's scores are not known (:meth:`edgekv.attention.Score.of`).

    Args:
        text_files: UTF-8 texts of the user's own; default :func:`default_text`.

    Raises:
        EdgekvError: the model or a text cannot be read, evictions do not work on the model, or the text is too short.
    """
    gguf = GGUF(path)
    native.cache_layers(path)  # a model that cannot be evicted from needs no filters, and this says why
    fingerprint = model_fingerprint(gguf)
    files = [Path(file) for file in text_files]
    texts = [read_text(file) for file in files] or [default_text()]

    n_ctx = min(SEQUENCE_TOKENS, gguf.context_length)
    with Session(path, n_ctx=n_ctx, n_threads=n_threads, flash_attn=True, tap_queries=True) as session:
        where = ", ".join(map(str, files)) or "the default text"
        sequences = token_sequences(session, texts, n_ctx, where)
        score = _score(gguf)
        held_out = _held_out(session, texts, sequences) if score else []

        with _progress_bar(progress, sum(map(len, sequences)) + len(held_out)) as advance:
            for tokens in sequences:
                session.clear()
                session.read(tokens, each=advance)

            layers = session.layers()
            vectors, reports, n_queries = [], [], 0
            for i, layer in enumerate(layers):
                taps = [native.tap(session.ctx, i, h, layer.head_size_k) for h in range(layer.n_head)]
                n_queries = taps[0][2]
                made, report = from_moments(
                    np.stack([moment for moment, _, _ in taps]),
                    np.stack([total for _, total, _ in taps]),
                    layer.n_head // layer.n_head_kv,
                    n_queries,
                )
                vectors.append(made)
                reports.append(report)
            report = join_reports(reports)
            if held_out:
                session.clear()
                by_layer = {layer.il: made for layer, made in zip(layers, vectors)}
                found = quality.judge(session, by_layer, held_out, quality.N_STEPS, score, advance)
                report |= {name: np.concatenate(found[name]) for name in ("spearman", "spearman_knorm")}

        filters = QFilters(
            vectors,
            [layer.il for layer in layers],
            method="calibrated: top eigenvector of the uncentred second moment of post-RoPE queries, mean over the group",
            text_sha256=[hashlib.sha256(text.encode()).hexdigest() for text in texts],
            n_tokens=sum(map(len, sequences)),
            n_queries=n_queries,
            runtime=f"llama-cpp-python {_runtime.BINDINGS_VERSION}, {native.cpu_variant()}",
            model_sha256=fingerprint,
            report=report,
        )
    filters.validate(gguf)
    return filters


def filters_for(
    path: str | os.PathLike[str],
    *,
    n_threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> QFilters:
    """A model's filters: those in its file, else those in the user's cache folder, else calibrated now and kept there.

    ``say`` gets a line if they are calibrated.

    Raises:
        EdgekvError: as :func:`calibrate`, or the file's filters are damaged. A cache folder that cannot be written, or a
            damaged file in it, is not an error: they are calibrated again.
    """
    gguf = GGUF(path)
    if found := read(gguf):
        found.validate(gguf)
        return found

    kept = cache_dir("filters") / f"{model_fingerprint(gguf)}.gguf"
    try:
        if kept.is_file() and (found := read(GGUF(kept))):
            found.validate(gguf, source=kept)
            return found
    except EdgekvError:
        pass

    say(f"{path}: has no Q-Filters, calibrating them once (edgekv convert --with-qfilters puts them into the file)")
    found = calibrate(path, n_threads=n_threads, progress=True)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_filters(kept, gguf, found)
    except (EdgekvError, OSError) as error:
        say(f"the filters are not kept for the next time: {error}")
    return found


def read_text(path: Path) -> str:
    """EdgekvError, naming the file, if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EdgekvError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise EdgekvError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise EdgekvError(f"{path}: cannot be read: {error.strerror or error}") from None


def token_sequences(vocabulary: Vocabulary, texts: list[str], n_ctx: int, where: str) -> list[list[int]]:
    """Up to N_SEQUENCES runs of tokens, evenly spread over the text, each begun as the model begins a text.

    EdgekvError, naming ``where``, if the text is too short.
    """
    begin = vocabulary.tokenize("")
    tokens = vocabulary.tokenize("\n\n".join(texts))[len(begin) :]
    length = n_ctx - len(begin)
    n_max = N_SEQUENCES * SEQUENCE_TOKENS // n_ctx

    n = min(n_max, -(-len(tokens) // length))
    starts = np.linspace(0, max(0, len(tokens) - length), n).astype(int) if n > 1 else [0]
    sequences = [begin + tokens[start : start + length] for start in starts]

    found = sum(map(len, sequences))
    if found < MIN_QUERIES:
        raise EdgekvError(f"{where}: {found} tokens are too few to calibrate on, at least {MIN_QUERIES} are needed")
    return sequences


def _score(gguf: GGUF) -> Score | None:
    try:
        return Score.of(gguf)
    except EdgekvError:
        return None


def _held_out(session: Session, texts: list[str], sequences: list[list[int]]) -> list[int]:
    """Tokens that are in none of the sequences, begun as the model begins a text; none if the text is too short."""
    begin = session.tokenize("")
    tokens = session.tokenize("\n\n".join(texts))[len(begin) :]
    length, n = len(sequences[0]) - len(begin), HELD_OUT_TOKENS - len(begin)
    second = (len(tokens) - length) // max(1, len(sequences) - 1)  # where the second sequence begins
    if len(sequences[0]) < HELD_OUT_TOKENS or second < length + n:
        return []
    start = (length + second - n) // 2
    return begin + tokens[start : start + n]


def _progress_bar(show: bool, total: int):
    from edgekv.progress import bar

    return bar("calibrating", total, unit="tokens", show=show)
