"""Q-Filters in the form in which they are published, in and out.

The form (github.com/NathanGodey/qfilters, and kvpress): a safetensors file with a tensor ``q_filters`` ``[layers,
kv_heads, head_dim]``, one row per layer of the model, in the channel order of transformers, and negated: there the
lowest projection stays. Nothing in it says which model it is for.

Files that :func:`save` writes say more, in their metadata under ``edgekv.qfilters``: JSON with ``version`` 1, ``sign``
``negated``, ``layers`` (those that have filters; the rows of the others are zero) and the attributes of
:class:`edgekv.filters.QFilters`. Other readers ignore it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

from edgekv import atomic, hub
from edgekv.errors import EdgekvError
from edgekv.filters import REPORT, QFilters, model_fingerprint, read
from edgekv.gguf_file import GGUF, MAGIC
from edgekv.rope_layout import halves_to_pairs, pairs_to_halves, permuted

TENSOR = "q_filters"
METADATA = "edgekv.qfilters"
VERSION = 1
SIGN = "negated"
MAX_BYTES = 256 << 20  # filters of the largest models take a few MiB

# the attributes that METADATA holds as they are, and their types
_PLAIN = {"method": str, "n_tokens": int, "n_queries": int, "runtime": str, "model_sha256": str}


def load(source: str | os.PathLike[str], gguf: GGUF, *, flag: str = "--qfilters") -> QFilters:
    """Filters for a model, checked against it.

    ``source``: a safetensors file in the published form, a folder that holds one, ``ORG/NAME`` or ``hf:ORG/NAME`` for a
    repository on the Hugging Face hub that does, or a GGUF file that holds filters. Of a safetensors file the rows of
    those layers are taken that evictions work on; the others only need to be finite.

    EdgekvError, naming ``flag`` and the source, if it cannot be read or fetched, or does not fit the model.
    """
    path = find(source, flag=flag)
    if is_gguf(path, f"{flag} {source}"):
        filters = read(GGUF(path))
        if filters is None:
            raise EdgekvError(f"{flag} {source}: this GGUF holds no Q-Filters")
        filters.validate(gguf, source=f"{flag} {source}")
        return filters
    where = f"{flag} {source}" if Path(source) == path else f"{flag} {source}: {path.name}"
    return _import(path, gguf, where)


def find(source: str | os.PathLike[str], *, flag: str) -> Path:
    """The file that ``source`` of :func:`load` means, fetched if need be. EdgekvError, naming ``flag``, if there is
    none."""
    path, text = Path(source), os.fspath(source)
    if not os.path.lexists(path) and hub.is_repo_id(text):
        try:
            path = hub.snapshot(hub.repo_id(text), ["*.safetensors"], MAX_BYTES)
        except EdgekvError as error:
            raise EdgekvError(f"{flag} {error}") from None
    try:
        if path.is_dir():
            return _in_folder(path, f"{flag} {source}")
        path.stat()
    except FileNotFoundError:
        raise EdgekvError(f"{flag} {source}: no such file or folder; ORG/NAME names filters on the Hugging Face "
                          "hub") from None
    except (OSError, ValueError) as e:
        raise EdgekvError(f"{flag} {source}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    return path


def is_gguf(path: Path, where: str) -> bool:
    """Whether a file begins like a GGUF file. EdgekvError, naming ``where``, if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError as e:
        raise EdgekvError(f"{where}: cannot be read: {e.strerror or e}") from None


def _in_folder(folder: Path, where: str) -> Path:
    """The only safetensors file of a folder, or of several the only one with filters."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EdgekvError(f"{where}: holds no .safetensors file")
    if len(files) > 1:
        holding = [path for path in files if TENSOR in _names(path)]
        if len(holding) != 1:
            listed = ", ".join(path.name for path in (holding or files)[:4])
            raise EdgekvError(f"{where}: holds {len(holding) or 'no'} files with a tensor {TENSOR}; name one of them "
                              f"({listed})")
        return holding[0]
    return files[0]


def _names(path: Path) -> list[str]:
    """The tensors of a safetensors file, none if it cannot be read; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            return list(f.keys())
    except (OSError, SafetensorError):
        return []


# --- in ------------------------------------------------------------------------------------------------------------


def _import(path: Path, gguf: GGUF, where: str) -> QFilters:
    shape, layers = _shape(gguf)
    data, published, metadata = _read(path, where)
    if published.shape != shape:
        raise EdgekvError(f"{where}: {TENSOR} has shape {list(published.shape)}, but {gguf.path} needs {list(shape)} "
                          "[layers, KV heads, head size]; it belongs to another model")
    if not np.isfinite(published).all():
        il = int(np.nonzero(~np.isfinite(published).all(axis=(1, 2)))[0][0])
        raise EdgekvError(f"{where}: {TENSOR} holds NaN or infinity in layer {il}")

    rows = -published[layers]
    if permuted(gguf.architecture):
        rows = halves_to_pairs(rows)
    digest = hashlib.sha256(data).hexdigest()
    filters = QFilters(list(rows), layers, method=f"imported from {path.name}, sha256 {digest}",
                       model_sha256=model_fingerprint(gguf))
    for name, value in metadata.items():
        setattr(filters, name, value)
    filters.validate(gguf, source=where)
    return filters


def _shape(gguf: GGUF) -> tuple[tuple[int, int, int], list[int]]:
    """The shape of a model's published filters, and the layers that evictions work on.

    EdgekvError if it has no published form, or if llama.cpp or eviction refuses the model.
    """
    from edgekv import native

    permuted(gguf.architecture)
    layers = native.cache_layers(gguf.path)
    sizes = {(layer.n_head_kv, layer.head_size_k) for layer in layers}
    if len(sizes) != 1:
        raise EdgekvError(f"{gguf.path}: has no published form of Q-Filters: the number or the size of its KV heads "
                          "differs between layers; calibrate instead")
    # blocks that predict further tokens come behind the model's layers, and are none of transformers' model
    behind = gguf.get(f"{gguf.architecture}.nextn_predict_layers", 0)
    n_layer = gguf.n_layer - (behind if isinstance(behind, int) else 0)
    return (n_layer, *sizes.pop()), [layer.il for layer in layers]


def _read(path: Path, where: str) -> tuple[bytes, np.ndarray, dict]:
    """A safetensors file's bytes, its filters as float32 [layers, KV heads, head size], and attributes of QFilters."""
    from safetensors import SafetensorError, deserialize

    try:
        if path.stat().st_size > MAX_BYTES:
            raise EdgekvError(f"{where}: too large for a file of Q-Filters")
        data = path.read_bytes()
        tensors = dict(deserialize(data))
    except OSError as e:
        raise EdgekvError(f"{where}: cannot be read: {e.strerror or e}") from None
    except SafetensorError as e:
        raise EdgekvError(f"{where}: not a safetensors file ({e})") from None
    if TENSOR not in tensors:
        raise EdgekvError(f"{where}: has no tensor {TENSOR}; is it a file of Q-Filters?")
    t = tensors[TENSOR]
    raw, dtype, shape = bytes(t["data"]), t["dtype"], t["shape"]
    if dtype == "BF16":
        flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F16", "F32", "F64"):
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            flat = np.frombuffer(raw, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    else:
        raise EdgekvError(f"{where}: {TENSOR} has type {dtype}; F16, BF16, F32 or F64 are supported")
    header = json.loads(data[8:8 + struct.unpack_from("<Q", data)[0]])  # deserialize has checked it
    return data, flat.reshape(shape), _attributes(header.get("__metadata__", {}).get(METADATA), where)


def _attributes(text: str | None, where: str) -> dict:
    """What a file's metadata says of its filters. EdgekvError if that is not what :func:`save` writes."""
    if text is None:
        return {}

    def bad(what: str) -> EdgekvError:
        return EdgekvError(f"{where}: damaged metadata {METADATA}: {what}; export the filters again")

    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise bad("is no JSON") from None
    if not isinstance(said, dict):
        raise bad("is no object")
    if said.get("version") != VERSION:
        raise EdgekvError(f"{where}: {METADATA} has version {said.get('version')!r}, this edgekv reads {VERSION}; "
                          "update edgekv")
    if said.get("sign") != SIGN:
        raise bad(f"sign is not {SIGN!r}")
    for name, kind in _PLAIN.items():
        # bool is an int; a GGUF holds numbers as u64
        if type(said.get(name)) is not kind or kind is int and not 0 <= said[name] < 2**64:
            raise bad(f"{name} is missing or of the wrong type")
    texts, report = said.get("text_sha256"), said.get("report")
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise bad("text_sha256 is missing or no list of strings")
    if not isinstance(report, dict) or not all(isinstance(numbers, list) and all(type(x) is float for x in numbers)
                                               for numbers in report.values()):
        raise bad("report is missing or holds more than numbers")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return {**{name: said[name] for name in _PLAIN}, "text_sha256": texts,
                "report": {name: np.array(report[name], np.float32) for name in REPORT if name in report}}


# --- out -----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], filters: QFilters, gguf: GGUF) -> None:
    """Write a model's filters in the published form, F32; :func:`load` gives the same filters back, bit for bit.

    The rows of layers without filters are zero. EdgekvError, with nothing written, if the filters are not the model's,
    if the model has no published form, or if ``path`` cannot be written.
    """
    from safetensors.numpy import save as serialize

    filters.validate(gguf)
    shape, _ = _shape(gguf)
    if {v.shape for v in filters.vectors} != {shape[1:]} or filters.layers[-1] >= shape[0]:
        raise EdgekvError(f"{gguf.path}: has Q-Filters for other layers than evictions work on; "
                          "make them again with edgekv calibrate")
    rows = np.stack(filters.vectors)
    if permuted(gguf.architecture):
        rows = pairs_to_halves(rows)
    published = np.zeros(shape, np.float32)
    published[filters.layers] = -rows
    said = {"version": VERSION, "sign": SIGN, "layers": filters.layers,
            **{name: getattr(filters, name) for name in _PLAIN}, "text_sha256": filters.text_sha256,
            "report": {name: values.tolist() for name, values in filters.report.items()}}
    atomic.write(path, [serialize({TENSOR: published}, metadata={"format": "pt", METADATA: json.dumps(said)})])
