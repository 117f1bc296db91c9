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
===================  ============  ======================================================================================

A reader refuses other versions and other signs, ignores keys under ``edgekv.qfilters.`` that it does not know, and
refuses filters whose fingerprint is not that of the model in the same file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.gguf_file import ARRAY, F32, GGUF, I32, STRING, U32, U64

PREFIX = "edgekv.qfilters."
VERSION = 1
SIGN = "keep-high"

# Architectures whose conversion permutes the rows of Q and K in every head from halves (channel i rotates with
# i + d/2, as in transformers) to pairs (2i with 2i + 1), ...
_PERMUTED = {"llama", "arcee", "granite", "minicpm", "mistral3", "smollm3"}
# ... and those that keep the halves.
_UNPERMUTED = {"exaone4", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe",
               "seed_oss", "starcoder2"}

_MAX_SAFETENSORS = 256 << 20  # filters of the largest models take a few MiB

# where one of these is present, not every layer with KV heads is one that evictions work on
_PARTIAL = ("attention.sliding_window", "attention.shared_kv_layers", "full_attention_interval")


@dataclass
class QFilters:
    """Filters of a model and where they come from.

    ``vectors[i]``: float32 ``[n_head_kv, head_size]`` for model layer ``layers[i]``, in the channel order of the cached
    keys; a higher projection means: keep. The other attributes are the metadata of the same name.
    """

    vectors: list[np.ndarray]
    layers: list[int]
    method: str = ""
    text_sha256: list[str] = field(default_factory=list)
    n_tokens: int = 0
    n_queries: int = 0
    runtime: str = ""
    model_sha256: str = ""

    def __post_init__(self) -> None:
        self.vectors = [np.ascontiguousarray(v, dtype=np.float32) for v in self.vectors]
        self.layers = [int(il) for il in self.layers]

    @property
    def head_count_kv(self) -> list[int]:
        return [v.shape[0] for v in self.vectors]

    @property
    def head_size(self) -> list[int]:
        return [v.shape[1] for v in self.vectors]

    def flat(self) -> np.ndarray:
        """All vectors as one float32 array: layer-major, then KV head, then channel."""
        return np.concatenate([v.ravel() for v in self.vectors]) if self.vectors else np.zeros(0, np.float32)

    def validate(self, gguf: GGUF, source: str | os.PathLike[str] | None = None) -> None:
        """Check shape, values and fingerprint against a model.

        EdgekvError, naming ``source`` (default: the model's file), if the filters do not fit it, hold NaN, infinity or
        an all-zero vector, or were made for another model.
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
        if self.model_sha256 != model_fingerprint(gguf):
            raise EdgekvError(f"{where} were made for another model (model_sha256 differs); "
                              "make them again with edgekv calibrate")

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
        return [(PREFIX + key, vtype, item_type, value) for key, vtype, item_type, value in items]


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def read(gguf: GGUF) -> QFilters | None:
    """The filters in a file's metadata, None if it has none.

    Checks the format (types, version, sign, lengths); :meth:`QFilters.validate` checks that they fit the model.
    EdgekvError if the format is not what the module's documentation says.
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

    return QFilters(
        vectors, layers,
        method=value("method", STRING),
        text_sha256=list(value("text_sha256", ARRAY, STRING, [])),
        n_tokens=value("n_tokens", U64),
        n_queries=value("n_queries", U64),
        runtime=value("runtime", STRING, None, ""),
        model_sha256=value("model_sha256", STRING),
    )


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
        for data in gguf.chunks(t.offset, t.nbytes):
            h.update(data)
    return h.hexdigest()


def halves_to_pairs(vectors: np.ndarray) -> np.ndarray:
    """The last axis from ``[a0 .. a(d/2-1), b0 .. b(d/2-1)]`` to ``[a0, b0, a1, b1, ...]``."""
    half = vectors.shape[-1] // 2
    return np.stack([vectors[..., :half], vectors[..., half:]], axis=-1).reshape(vectors.shape)


def from_safetensors(path: str | os.PathLike[str], gguf: GGUF) -> QFilters:
    """Filters in the published form: tensor ``q_filters`` ``[layers, kv_heads, head_dim]``, F16, BF16, F32 or F64, in
    the channel order of transformers (RoPE in halves), and negated (the lowest projection stays).

    They are negated back and, where the model's conversion permutes Q and K, permuted. The file does not say which
    model it is for: only its shape can be checked. EdgekvError if the file cannot be read or does not fit.
    """
    path = Path(path)
    arch = gguf.architecture
    if arch not in _PERMUTED | _UNPERMUTED:
        raise EdgekvError(f"{gguf.path}: importing Q-Filters is not supported yet for the architecture {arch!r}; "
                          "calibrate instead (edgekv convert --with-qfilters without --qfilters)")
    if gguf.key_length % 2:
        raise EdgekvError(f"{gguf.path}: damaged GGUF file: RoPE needs an even head size, not {gguf.key_length}")
    published = _read_q_filters(path)
    expected = (gguf.n_layer, gguf.head_count_kv[0], gguf.key_length)
    if len(set(gguf.head_count_kv)) != 1 or published.shape != expected:
        raise EdgekvError(f"{path}: q_filters has shape {list(published.shape)}, but {gguf.path} needs "
                          f"{list(expected)} [layers, KV heads, head size]")
    vectors = -published
    if arch in _PERMUTED:
        vectors = halves_to_pairs(vectors)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    filters = QFilters(list(vectors), list(range(gguf.n_layer)), model_sha256=model_fingerprint(gguf),
                       method=f"imported from {path.name}, sha256 {digest}")
    filters.validate(gguf, source=path)
    return filters


def _read_q_filters(path: Path) -> np.ndarray:
    """Tensor ``q_filters`` of a safetensors file as float32."""
    from safetensors import SafetensorError, deserialize

    try:
        if path.stat().st_size > _MAX_SAFETENSORS:
            raise EdgekvError(f"{path}: too large for a file of Q-Filters")
        tensors = dict(deserialize(path.read_bytes()))
    except FileNotFoundError:
        raise EdgekvError(f"{path}: no such file") from None
    except OSError as e:
        raise EdgekvError(f"{path}: cannot be read: {e.strerror or e}") from None
    except SafetensorError as e:
        raise EdgekvError(f"{path}: not a safetensors file ({e})") from None
    if "q_filters" not in tensors:
        raise EdgekvError(f"{path}: has no tensor q_filters; is it a file of Q-Filters?")
    t = tensors["q_filters"]
    data, dtype, shape = bytes(t["data"]), t["dtype"], t["shape"]
    if dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F16", "F32", "F64"):
        flat = np.frombuffer(data, "<f" + str(int(dtype[1:]) // 8)).astype(np.float32)
    else:
        raise EdgekvError(f"{path}: q_filters has type {dtype}; F16, BF16, F32 or F64 are supported")
    return flat.reshape(shape)


def from_moments(moments: np.ndarray, sums: np.ndarray, group: int) -> np.ndarray:
    """The filters of one layer from statistics of its queries (arXiv 2503.02812, section 3).

    ``moments`` float64 ``[n_head, head_size, head_size]``: ``sum q q^T`` of each query head's post-RoPE queries, not
    centred; ``sums`` float64 ``[n_head, head_size]``: ``sum q``; ``group``: consecutive query heads per KV head. The
    first right-singular vector of the matrix of queries is the top eigenvector of its second moment.

    Returns float32 ``[n_head / group, head_size]``. EdgekvError if the statistics are empty or not finite.
    """
    moments = np.asarray(moments, np.float64)
    sums = np.asarray(sums, np.float64)
    n_head, size = sums.shape
    if moments.shape != (n_head, size, size) or group <= 0 or n_head % group:
        raise ValueError(f"moments {moments.shape}, sums {sums.shape} and group {group} do not match")
    if not (np.isfinite(moments).all() and np.isfinite(sums).all()):
        raise EdgekvError("the model's queries are not finite; the model file is damaged")
    directions = np.empty((n_head, size))
    for h in range(n_head):
        if not moments[h].any():
            raise EdgekvError("no queries to make Q-Filters from; give a longer text")
        # eigh reads one triangle: make the rounding of the other one irrelevant
        u = np.linalg.eigh((moments[h] + moments[h].T) / 2)[1][:, -1]
        side = u @ sums[h]
        # a mean query exactly across u says nothing; any fixed rule keeps the result reproducible
        directions[h] = u if side > 0 or (side == 0 and u[np.abs(u).argmax()] > 0) else -u
    return directions.reshape(n_head // group, group, size).mean(axis=1).astype(np.float32)
