"""Q-Filters: one direction per KV head that tells which cached keys future queries will look at.

The method is Q-Filters (arXiv 2503.02812, section 3): the queries of a head, after RoPE and uncentred, spread mostly
along one direction, their first right-singular vector ``u``, signed so that the mean query projects positively on it.
The projection of a key on ``u`` then estimates the attention it will get. With grouped-query attention the KV head's
filter is the mean of the directions of its query heads, not normalised again. Here a **higher** projection means
"keep".

Format in GGUF metadata, version 1
----------------------------------

All keys begin with ``edgekv.qfilters.``. Runtimes that do not know them ignore them.

===================  ============  ======================================================================================
key                  type          meaning
===================  ============  ======================================================================================
``version``          u32           1
``layers``           array of i32  the L model layers (from 0, ascending) that have filters: one per layer that caches
                                   keys of its own and attends to all of them
``head_count_kv``    array of i32  L numbers: KV heads of each of these layers
``head_size``        array of i32  L numbers: channels of one K head of each of these layers
``vectors``          array of f32  ``sum(head_count_kv[i] * head_size[i])`` numbers: layer by layer, in a layer KV head
                                   by KV head, in a head channel by channel, in the channel order of the keys as
                                   llama.cpp caches them (after the RoPE permutation of the model's conversion, before
                                   the rotation it applies to quantised caches). Finite; no vector is all zero
``sign``             string        ``keep-high``: the keys with the highest projection stay
``method``           string        how the vectors were made
``model_sha256``     string        fingerprint of the model they belong to, see :func:`model_fingerprint`
``text_sha256``      array of      optional: SHA-256 of each text (UTF-8) whose queries were used; such texts must not
                     string        be evaluated on
``n_tokens``         u64           tokens of text that were read; 0 = not known
``n_queries``        u64           query vectors per query head; 0 = not known
``runtime``          string        optional: what computed them (llama.cpp pin, CPU variant, threads)
``report.NAME``      array of f32  optional: how well they fit, see below; one number per vector, in their order
===================  ============  ======================================================================================

Reports, for each KV head (the first two are means over its query heads):

``energy``
    The share of the queries' second moment that lies along their direction: top eigenvalue / trace, in [0, 1].
``one_sided``
    Mean / root mean square of the projections of the queries on their direction, in [0, 1]. The method assumes that
    they have one sign; for normal projections 0.79 means that a tenth has the other one.
``spearman``, ``spearman_knorm``
    Rank correlation of the filter's score, and of K-norm's, with the attention that keys really get, in [-1, 1]; on
    which text, :func:`edgekv.calibrate.calibrate` says.

A reader refuses other versions and other signs, ignores keys under ``edgekv.qfilters.`` that it does not know, and
refuses filters whose fingerprint is not that of the model in the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.gguf_file import ARRAY, F32, GGUF, I32, STRING, U32, U64

PREFIX = "edgekv.qfilters."
VERSION = 1
SIGN = "keep-high"

REPORT = {"energy": (0, 1), "one_sided": (0, 1), "spearman": (-1, 1), "spearman_knorm": (-1, 1)}  # name -> range

# where one of these is present, not every layer with KV heads is one that evictions work on
_PARTIAL = ("attention.sliding_window", "attention.shared_kv_layers", "full_attention_interval", "nextn_predict_layers")


@dataclass
class QFilters:
    """Filters of a model and where they come from.

    ``vectors[i]``: float32 ``[n_head_kv, head_size]`` for model layer ``layers[i]``, in the channel order of the cached
    keys; a higher projection means: keep. ``report``: name -> float32, one number per vector, layer by layer. The other
    attributes are the metadata of the same name.
    """

    vectors: list[np.ndarray]
    layers: list[int]
    method: str = ""
    text_sha256: list[str] = field(default_factory=list)
    n_tokens: int = 0
    n_queries: int = 0
    runtime: str = ""
    model_sha256: str = ""
    report: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vectors = [np.ascontiguousarray(v, dtype=np.float32) for v in self.vectors]
        self.layers = [int(il) for il in self.layers]
        self.report = {name: np.asarray(values, dtype=np.float32) for name, values in self.report.items()}

    @property
    def head_count_kv(self) -> list[int]:
        return [v.shape[0] for v in self.vectors]

    @property
    def head_size(self) -> list[int]:
        return [v.shape[1] for v in self.vectors]

    def flat(self) -> np.ndarray:
        """All vectors as one float32 array: layer-major, then KV head, then channel."""
        return np.concatenate([v.ravel() for v in self.vectors]) if self.vectors else np.zeros(0, np.float32)

    def by_layer(self, name: str) -> list[np.ndarray]:
        """A report as the vectors are: float32 ``[n_head_kv]`` per layer. KeyError if there is none."""
        return np.split(self.report[name], np.cumsum(self.head_count_kv)[:-1])

    def validate(self, gguf: GGUF, source: str | os.PathLike[str] | None = None) -> None:
        """Check shape, values and fingerprint against a model.

        EdgekvError, naming ``source`` (default: the model's file), if the filters do not fit it, hold NaN, infinity or
        an all-zero vector, were made for another model, or have a report that is none of theirs.
        """
        where = f"{source or gguf.path}: Q-Filters"
        if not self.layers or len(self.layers) != len(self.vectors):
            raise EdgekvError(f"{where} name {len(self.layers)} layers and hold vectors for {len(self.vectors)}")
        if self.layers != sorted(set(self.layers)) or self.layers[0] < 0 or self.layers[-1] >= gguf.n_layer:
            raise EdgekvError(f"{where} are for layers {_short(self.layers)}, but the model has layers 0 to "
                              f"{gguf.n_layer - 1}; they belong to another model")
        for il, v in zip(self.layers, self.vectors):
            want = (gguf.head_count_kv[il], gguf.key_length)
            if v.shape != want:
                raise EdgekvError(f"{where} have shape {list(v.shape)} in layer {il}, but the model needs "
                                  f"{list(want)} [KV heads, head size]; they belong to another model")
        complete = not any(f"{gguf.architecture}.{key}" in gguf for key in _PARTIAL)
        if complete and self.layers != gguf.attention_layers:
            raise EdgekvError(f"{where} cover {len(self.layers)} of the model's {len(gguf.attention_layers)} layers; "
                              "make them again with edgekv calibrate")
        for il, v in zip(self.layers, self.vectors):
            if not np.isfinite(v).all():
                raise EdgekvError(f"{where} hold NaN or infinity in layer {il}; make them again with edgekv calibrate")
            if (v == 0).all(axis=1).any():
                raise EdgekvError(f"{where} hold an all-zero vector in layer {il}; "
                                  "make them again with edgekv calibrate")
        if fault := self._report_fault():
            raise EdgekvError(f"{where} have a damaged report: {fault}; make them again with edgekv calibrate")
        if self.model_sha256 != model_fingerprint(gguf):
            raise EdgekvError(f"{where} were made for another model (model_sha256 differs); "
                              "make them again with edgekv calibrate")

    def _report_fault(self) -> str:
        for name, values in self.report.items():
            low, high = REPORT[name]
            if values.shape != (sum(self.head_count_kv),):
                return f"{PREFIX}report.{name} has {values.size} numbers for {sum(self.head_count_kv)} KV heads"
            if not ((values >= low) & (values <= high)).all():  # NaN is in no range
                return f"{PREFIX}report.{name} holds numbers that are not between {low} and {high}"
        return ""

    def metadata(self) -> list[tuple[str, int, int | None, object]]:
        """What to store: (key, value type, item type of an array, value), types as in :mod:`edgekv.gguf_file`."""
        items: list[tuple[str, int, int | None, object]] = [
            ("version", U32, None, VERSION),
            ("layers", ARRAY, I32, self.layers),
            ("head_count_kv", ARRAY, I32, self.head_count_kv),
            ("head_size", ARRAY, I32, self.head_size),
            ("vectors", ARRAY, F32, self.flat()),
            ("sign", STRING, None, SIGN),
            ("method", STRING, None, self.method),
            ("model_sha256", STRING, None, self.model_sha256),
            ("n_tokens", U64, None, self.n_tokens),
            ("n_queries", U64, None, self.n_queries),
        ]
        # left out when empty: some readers stumble over empty arrays
        if self.text_sha256:
            items.append(("text_sha256", ARRAY, STRING, self.text_sha256))
        if self.runtime:
            items.append(("runtime", STRING, None, self.runtime))
        items += [(f"report.{name}", ARRAY, F32, values) for name, values in self.report.items()]
        return [(PREFIX + key, vtype, item_type, value) for key, vtype, item_type, value in items]


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def read(gguf: GGUF) -> QFilters | None:
    """The filters in a file's metadata, None if it has none.

    Checks the format (types, version, sign, lengths, the report's values); :meth:`QFilters.validate` checks that they
    fit the model. EdgekvError if the format is not what the module's documentation says.
    """
    if not any(key.startswith(PREFIX) for key in gguf.fields):
        return None

    def bad(why: str) -> EdgekvError:
        return EdgekvError(f"{gguf.path}: damaged Q-Filters: {why}; make them again with edgekv convert")

    def value(key: str, vtype: int, item_type: int | None = None, default: object = None):
        f = gguf.fields.get(PREFIX + key)
        if f is None and default is not None:
            return default
        if f is None or (f.type, f.item_type) != (vtype, item_type):
            raise bad(f"{PREFIX}{key} is missing or of the wrong type")
        return gguf.get(PREFIX + key)

    version = value("version", U32)
    if version != VERSION:
        raise EdgekvError(f"{gguf.path}: Q-Filters of format version {version}, this edgekv reads version {VERSION}; "
                          "update edgekv or make them again with edgekv convert")
    sign = value("sign", STRING)
    if sign != SIGN:
        raise bad(f"{PREFIX}sign is not {SIGN!r}")

    layers = value("layers", ARRAY, I32).tolist()
    heads = value("head_count_kv", ARRAY, I32).tolist()
    sizes = value("head_size", ARRAY, I32).tolist()
    numbers = value("vectors", ARRAY, F32)
    if not layers or not len(layers) == len(heads) == len(sizes) or min(heads) <= 0 or min(sizes) <= 0:
        raise bad("the layers, head counts and head sizes do not match")
    if sum(h * s for h, s in zip(heads, sizes)) != len(numbers):
        raise bad(f"{PREFIX}vectors has {len(numbers)} numbers")
    vectors, at = [], 0
    for h, s in zip(heads, sizes):
        vectors.append(numbers[at:at + h * s].reshape(h, s))
        at += h * s

    filters = QFilters(
        vectors, layers,
        method=value("method", STRING),
        text_sha256=list(value("text_sha256", ARRAY, STRING, [])),
        n_tokens=value("n_tokens", U64),
        n_queries=value("n_queries", U64),
        runtime=value("runtime", STRING, None, ""),
        model_sha256=value("model_sha256", STRING),
        report={name: value(f"report.{name}", ARRAY, F32) for name in REPORT if f"{PREFIX}report.{name}" in gguf},
    )
    if fault := filters._report_fault():
        raise bad(fault)
    return filters


def model_fingerprint(gguf: GGUF) -> str:
    """SHA-256 (hex) over what makes a model itself and survives re-quantisation.

    Hashed, in this order: the line ``edgekv model 1``; the architecture; the query heads and the KV heads of every
    layer, comma-separated; the head sizes of K and V; then for every F32 tensor with ``norm`` in its name, sorted by
    name (bytes), a line ``name dim,dim,...`` (fastest first) and its raw little-endian data. Every line ends in ``\\n``,
    UTF-8.
    """
    h = hashlib.sha256()

    def line(text: str) -> None:
        h.update(text.encode("utf-8", "surrogateescape") + b"\n")

    line("edgekv model 1")
    line(gguf.architecture)
    line(",".join(map(str, gguf.head_count)))
    line(",".join(map(str, gguf.head_count_kv)))
    line(f"{gguf.key_length},{gguf.value_length}")
    norms = [t for t in gguf.tensors.values() if t.type == 0 and "norm" in t.name]
    for t in sorted(norms, key=lambda t: t.name.encode("utf-8", "surrogateescape")):
        line(f"{t.name} {','.join(map(str, t.shape))}")
        for data in gguf.chunks(t):
            h.update(data)
    return h.hexdigest()


def from_moments(moments: np.ndarray, sums: np.ndarray, group: int,
                 n_queries: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The filters of one layer from statistics of its queries (arXiv 2503.02812, section 3), and how well they fit.

    ``moments`` float64 ``[n_head, head_size, head_size]``: ``sum q q^T`` of each query head's post-RoPE queries, not
    centred; ``sums`` float64 ``[n_head, head_size]``: ``sum q``; ``group``: consecutive query heads per KV head;
    ``n_queries``: summands per query head. The first right-singular vector of the matrix of queries is the top
    eigenvector of its second moment.

    Returns float32 ``[n_head / group, head_size]``, and the reports ``energy`` and ``one_sided`` (see the module's
    documentation), each float32 ``[n_head / group]``; :func:`join_reports` puts those of the layers together.
    EdgekvError if the statistics are empty or not finite.
    """
    moments = np.asarray(moments, np.float64)
    sums = np.asarray(sums, np.float64)
    n_head, size = sums.shape
    if moments.shape != (n_head, size, size) or group <= 0 or n_head % group:
        raise ValueError(f"moments {moments.shape}, sums {sums.shape} and group {group} do not match")
    if not (np.isfinite(moments).all() and np.isfinite(sums).all()):
        raise EdgekvError("the model's queries are not finite; the model file is damaged")
    directions = np.empty((n_head, size))
    energy, one_sided = np.empty(n_head), np.empty(n_head)
    for h in range(n_head):
        if not moments[h].any():
            raise EdgekvError("no queries to make Q-Filters from; give a longer text")
        # eigh reads one triangle: make the rounding of the other one irrelevant
        values, axes = np.linalg.eigh((moments[h] + moments[h].T) / 2)
        u = axes[:, -1]
        side = u @ sums[h]
        # a mean query exactly across u says nothing; any fixed rule keeps the result reproducible
        directions[h] = u if side > 0 or (side == 0 and u[np.abs(u).argmax()] > 0) else -u
        # the sum of the squared projections is the eigenvalue; rounding may push both shares past 1
        energy[h] = min(1.0, values[-1] / np.trace(moments[h]))
        one_sided[h] = min(1.0, abs(side) / np.sqrt(n_queries * values[-1]))

    def mean(of_heads: np.ndarray) -> np.ndarray:
        return of_heads.reshape(n_head // group, group, -1).mean(axis=1).astype(np.float32)

    return mean(directions), {"energy": mean(energy)[:, 0], "one_sided": mean(one_sided)[:, 0]}


def join_reports(layers: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The reports of all layers, for :class:`QFilters`, from those of each layer."""
    return {name: np.concatenate([report[name] for report in layers]) for name in layers[0]}
