"""Reading GGUF headers.

The ``gguf`` package reads every element of every array (seconds for a large vocabulary) and trusts most lengths. This
reader only notes where each value lies, decodes a value when it is asked for, and checks every length against the
file before using it, so a foreign or truncated file costs an :class:`EdgekvError` and no memory.

GGUF versions 2 and 3, little-endian: magic ``GGUF``, u32 version, u64 number of tensors, u64 number of key-value
pairs, the pairs, the tensor infos, padding to ``general.alignment`` (default 32), the tensor data.

A split model is several such files, PREFIX-00001-of-000NN.gguf and so on, as llama.cpp names and finds them: the first
holds the metadata, all hold tensors (the first may have none), and each says which part of how many it is in
``split.no`` (u16, from 0), ``split.count`` (u16) and ``split.tensors.count`` (i32, over all parts).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from edgekv.errors import EdgekvError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

# value type -> struct code, for all types of fixed size
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

CHUNK = 8 << 20    # bytes read at a time
MAX_NESTING = 4    # of arrays in arrays; llama.cpp takes none
MAX_LAYERS = 4096  # llama.cpp stops at 512; keeps per-layer lists small whatever the file says

# tensor type -> (name, elements in a block, bytes of a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class Field:
    """Where one key-value pair lies: ``start`` at its key, ``value`` behind the value's type, ``end`` behind it all."""

    key: str
    type: int
    start: int
    value: int
    end: int
    item_type: int | None = None  # of an array
    count: int = 1                # of an array


@dataclass(frozen=True)
class Tensor:
    """One tensor; ``shape`` in GGUF's order (fastest dimension first), ``offset`` from the start of its file ``path``."""

    name: str
    type: int
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0] if self.type in TENSOR_TYPES else f"type {self.type}"


_PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def split_name(path: str | os.PathLike[str]) -> tuple[str, int, int] | None:
    """(prefix, number from 1, number of parts) of a file named as a part of a split model, None for other names."""
    match = _PART_NAME.fullmatch(Path(path).name)
    return match and (match[1], int(match[2]), int(match[3]))


def part_path(path: str | os.PathLike[str], prefix: str, number: int, count: int) -> Path:
    """A part's file, beside ``path`` (``llama_split_path`` of llama.cpp; here numbers are from 1)."""
    return Path(path).with_name(f"{prefix}-{number:05}-of-{count:05}.gguf")


def _one_line(why: str) -> str:
    """What is wrong with a file, of which ``why`` may hold names: one line, and no more than a screen's width or three."""
    why = "".join(c if c.isprintable() else "?" for c in why[:300])
    return why + "..." if len(why) == 300 else why


class Part:
    """The header of one GGUF file: of a model, or of a part of a split one.

    Attributes: ``path``, ``size`` (bytes of the file), ``version``, ``alignment``, ``fields`` (key -> :class:`Field`,
    in the file's order), ``tensors`` (name -> :class:`Tensor`, in the file's order), ``kv_start``, ``kv_end``,
    ``infos_end``, ``data_offset`` (all from the start of the file).

    Raises :class:`EdgekvError`, naming the file, if it cannot be read, is no GGUF, is truncated or contradicts itself.
    With ``header_only`` the tensors' data may be missing.
    """

    def __init__(self, path: str | os.PathLike[str], missing: str = "no such file", header_only: bool = False):
        self.path = Path(path)
        self.header_only = header_only
        if self.path.is_dir():
            raise EdgekvError(f"{self.path}: is a folder; pass a .gguf file")
        try:
            with open(self.path, "rb") as f:
                self.size = os.fstat(f.fileno()).st_size
                if self.size < 24:
                    with_magic = f.read(4) == MAGIC
                    raise self._bad("truncated GGUF file" if with_magic else "not a GGUF file")
                with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as buf:
                    self._parse(buf)
        except FileNotFoundError:
            raise self._bad(missing) from None
        except OSError as e:
            raise self._bad(f"cannot be read: {e.strerror or e}") from None

    def _bad(self, why: str) -> EdgekvError:
        return EdgekvError(f"{self.path}: {_one_line(why)}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``: int, float, bool, str, a NumPy array (numeric arrays), or a list (of strings)."""
        field = self.fields.get(key)
        if field is None:
            return default
        data = b"".join(self.chunks(field.value, field.end - field.value))
        return _decode(data, 0, field.type)[0]

    def chunks(self, offset: int, n: int) -> Iterator[bytes]:
        """``n`` bytes of the file from ``offset`` on, piece by piece."""
        return _chunks(self.path, offset, n)

    @property
    def is_projector(self) -> bool:
        """Whether it makes embeddings of images or sound for a multimodal model, and is no language model."""
        return any(key in self.fields and self.fields[key].type == STRING and self.get(key) == value
                   for key, value in (("general.architecture", "clip"), ("general.type", "mmproj")))

    # --- parsing -----------------------------------------------------------------------------------------------

    def _parse(self, buf: mmap.mmap) -> None:
        if buf[:4] != MAGIC:
            raise self._bad("not a GGUF file")
        self.version, n_tensors, n_kv = struct.unpack_from("<IQQ", buf, 4)
        if self.version & 0xFFFF == 0:
            raise self._bad("big-endian GGUF file; only little-endian files are supported")
        if self.version not in (2, 3):
            raise self._bad(f"GGUF version {self.version}; only 2 and 3 are supported")
        try:
            self._parse_fields(buf, n_kv)
            self._parse_alignment(buf)
            self._parse_tensors(buf, n_tensors)
        except struct.error:  # a read beyond the end of the file
            raise self._bad("truncated GGUF file") from None

    def _skip_string(self, buf: mmap.mmap, at: int) -> int:
        end = at + 8 + struct.unpack_from("<Q", buf, at)[0]
        if end > self.size:
            raise self._bad("truncated GGUF file")
        return end

    def _skip_value(self, buf: mmap.mmap, at: int, vtype: int, depth: int = 0) -> tuple[int, int | None, int]:
        """The end of the value at ``at``, and for arrays the type and number of elements."""
        if vtype == STRING:
            return self._skip_string(buf, at), None, 1
        if vtype != ARRAY:
            if vtype not in SCALARS:
                raise self._bad(f"unknown metadata type {vtype}")
            end = at + struct.calcsize("<" + SCALARS[vtype])
            if end > self.size:
                raise self._bad("truncated GGUF file")
            return end, None, 1

        item_type, count = struct.unpack_from("<IQ", buf, at)
        at += 12
        if item_type in SCALARS:
            at += count * struct.calcsize("<" + SCALARS[item_type])
            if at > self.size:
                raise self._bad("truncated GGUF file")
        elif item_type == STRING:
            unpack, size = struct.Struct("<Q").unpack_from, self.size
            for _ in range(count):  # ends at the latest at the end of the file: every turn moves on by 8 bytes
                at += 8 + unpack(buf, at)[0]
                if at > size:
                    raise self._bad("truncated GGUF file")
        elif item_type == ARRAY and depth < MAX_NESTING:
            for _ in range(count):
                at = self._skip_value(buf, at, ARRAY, depth + 1)[0]
        else:
            raise self._bad(f"unsupported metadata array of type {item_type}")
        return at, item_type, count

    def _parse_fields(self, buf: mmap.mmap, n_kv: int) -> None:
        self.fields: dict[str, Field] = {}
        at = self.kv_start = 24
        for _ in range(n_kv):
            start, at = at, self._skip_string(buf, at)
            # surrogates keep foreign bytes apart and whole
            key = buf[start + 8:at].decode("utf-8", "surrogateescape")
            (vtype,) = struct.unpack_from("<I", buf, at)
            value = at + 4
            at, item_type, count = self._skip_value(buf, value, vtype)
            if not key or key in self.fields:
                raise self._bad(f"damaged GGUF file: metadata key {key!r} is empty or given twice")
            self.fields[key] = Field(key, vtype, start, value, at, item_type, count)
        self.kv_end = at

    def _parse_alignment(self, buf: mmap.mmap) -> None:
        self.alignment = DEFAULT_ALIGNMENT
        field = self.fields.get("general.alignment")
        if field is not None:
            self.alignment = struct.unpack_from("<I", buf, field.value)[0] if field.type == U32 else 0
        if self.alignment == 0 or self.alignment & (self.alignment - 1):
            raise self._bad("damaged GGUF file: general.alignment is no power of two")

    def _parse_tensors(self, buf: mmap.mmap, n_tensors: int) -> None:
        found: list[tuple[str, int, tuple[int, ...], int]] = []
        at = self.kv_end
        for _ in range(n_tensors):
            start, at = at, self._skip_string(buf, at)
            name = buf[start + 8:at].decode("utf-8", "surrogateescape")
            (n_dims,) = struct.unpack_from("<I", buf, at)
            if n_dims > 4:
                raise self._bad(f"damaged GGUF file: tensor {name!r} has {n_dims} dimensions")
            shape = struct.unpack_from(f"<{n_dims}Q", buf, at + 4)
            ttype, offset = struct.unpack_from("<IQ", buf, at + 4 + 8 * n_dims)
            at += 16 + 8 * n_dims
            found.append((name, ttype, shape, offset))
        self.infos_end = at
        self.data_offset = -(-at // self.alignment) * self.alignment

        self.tensors: dict[str, Tensor] = {}
        for name, ttype, shape, offset in found:
            n = 1
            for dim in shape:
                n *= dim
            # a type younger than this table still has to begin inside the file
            _, block, block_bytes = TENSOR_TYPES.get(ttype, ("", 1, 0))
            if n % block or (shape and shape[0] % block) or offset % self.alignment or name in self.tensors:
                raise self._bad(f"damaged GGUF file: the description of tensor {name!r} makes no sense")
            tensor = Tensor(name, ttype, shape, self.path, self.data_offset + offset, n // block * block_bytes)
            if tensor.offset + tensor.nbytes > self.size and not self.header_only:
                raise self._bad(f"truncated GGUF file: tensor {name!r} ends {tensor.offset + tensor.nbytes - self.size}"
                                " bytes behind the end of the file; fetch it again")
            self.tensors[name] = tensor


class GGUF:
    """A model's file, or its files: the path of a split model is that of the first part, which finds the others.

    Attributes: ``parts`` (a :class:`Part` per file), ``path`` (of the first), ``size`` (bytes of all files), ``fields``
    (the metadata: those of the first part), ``tensors`` (name -> :class:`Tensor`, of all parts, in their order).

    Raises :class:`EdgekvError`, naming the file, if one cannot be read, is no GGUF, is truncated or contradicts itself,
    if a part is missing or is not of this model, if the path is that of a later part, or if it is a projector. With
    ``header_only`` files may end behind their headers: then their tensors must not be read.
    """

    def __init__(self, path: str | os.PathLike[str], header_only: bool = False):
        first = Part(path, header_only=header_only)
        self.parts, self.path, self.fields = [first], first.path, first.fields
        if first.is_projector:
            raise self._bad("is the projector of a multimodal model (mmproj), not a language model: name the model's own "
                            "file, and this one with edgekv serve --mmproj")
        self.tensors = dict(first.tensors)
        index, count, total = _split_numbers(first)
        if count is not None and count > 1:  # 0 in a model that was joined again
            self._find_parts(index, count, total)
        self.size = sum(part.size for part in self.parts)

    def _bad(self, why: str) -> EdgekvError:
        return EdgekvError(f"{self.path}: {_one_line(why)}")

    def _find_parts(self, index: int | None, count: int, total: int | None) -> None:
        """Read the other parts of ``count``; this one says that it is the one with ``index``, of ``total`` tensors."""
        if index is None or index >= count or total is None:
            raise self._bad(f"damaged GGUF file: one of {count} parts, but which one (split.no) or of how many tensors "
                            "(split.tensors.count) is missing or wrong")
        named, number = split_name(self.path), index + 1
        if named is None or named[1:] != (number, count):
            raise self._bad(f"is part {number} of {count}, but its name does not end in -{number:05}-of-{count:05}.gguf,"
                            " so the others cannot be found; give all parts their names back")
        if number > 1:
            raise self._bad(f"is part {number} of {count}; pass the first part, "
                            f"{part_path(self.path, named[0], 1, count).name}")

        for number in range(2, count + 1):
            place = f"part {number} of {count} of {self.path.name}"
            part = Part(part_path(self.path, named[0], number, count), f"no such file; it is {place}: fetch it too",
                        self.parts[0].header_only)
            if _split_numbers(part) != [number - 1, count, total]:
                raise part._bad(f"is not {place}: its split.no, split.count and split.tensors.count say otherwise; "
                                "fetch the parts again")
            if twice := self.tensors.keys() & part.tensors.keys():
                raise part._bad(f"is not {place}: an earlier part has the tensor {min(twice)!r} too; "
                                "fetch the parts again")
            self.parts.append(part)
            self.tensors.update(part.tensors)
        if len(self.tensors) != total:
            raise self._bad(f"its {count} parts have {len(self.tensors)} tensors, but split.tensors.count says {total};"
                            " fetch the parts again")

    # --- values ------------------------------------------------------------------------------------------------

    def __contains__(self, key: object) -> bool:
        return key in self.fields

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, as :meth:`Part.get`."""
        return self.parts[0].get(key, default)

    def chunks(self, tensor: Tensor) -> Iterator[bytes]:
        """A tensor's bytes, piece by piece."""
        return _chunks(tensor.path, tensor.offset, tensor.nbytes)

    def tensor_data(self, name: str) -> np.ndarray:
        """The values of a small F32 tensor, float32, C order (slowest dimension first)."""
        t = self.tensors.get(name)
        if t is None or t.type != 0:
            raise self._bad(f"has no F32 tensor {name!r}")
        data = b"".join(self.chunks(t))
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(t.shape[::-1])

    # --- what the model says of itself ---------------------------------------------------------------------------

    def _typed(self, key: str, types: type | tuple[type, ...], what: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self._bad(f"no {key} in the metadata; is it a language model?")
        if not isinstance(value, types) or isinstance(value, bool):
            raise self._bad(f"damaged GGUF file: {key} is not {what}")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._typed(key, int, "a number", default)
        if value < 0:
            raise self._bad(f"damaged GGUF file: {key} is negative")
        return value

    def _per_layer(self, key: str, default: list[int] | None = None) -> list[int]:
        if default is not None and key not in self.fields:
            return default
        value = self._typed(key, (int, np.ndarray), "a number or one number per layer")
        if isinstance(value, int):
            value = np.full(self.n_layer, value)
        if value.dtype.kind not in "iu" or len(value) != self.n_layer or (value.astype(object) < 0).any():
            raise self._bad(f"damaged GGUF file: {key} is not one number per layer")
        return [int(v) for v in value]

    @cached_property
    def architecture(self) -> str:
        return self._typed("general.architecture", str, "a string")

    @cached_property
    def name(self) -> str:
        value = self.get("general.name", "")
        return value if isinstance(value, str) else ""

    @cached_property
    def n_layer(self) -> int:
        """Number of layers (``block_count``)."""
        n = self._count(f"{self.architecture}.block_count")
        if not 0 < n <= MAX_LAYERS:
            raise self._bad(f"damaged GGUF file: {self.architecture}.block_count is {n}")
        return n

    @cached_property
    def embedding_length(self) -> int:
        return self._count(f"{self.architecture}.embedding_length")

    @cached_property
    def context_length(self) -> int:
        """The context the model was trained for, in tokens."""
        return self._count(f"{self.architecture}.context_length")

    @cached_property
    def head_count(self) -> list[int]:
        """Query heads of each layer."""
        return self._per_layer(f"{self.architecture}.attention.head_count")

    @cached_property
    def head_count_kv(self) -> list[int]:
        """KV heads of each layer; 0 where a layer has no attention."""
        return self._per_layer(f"{self.architecture}.attention.head_count_kv", self.head_count)

    def _head_size(self, which: str) -> int:
        key = f"{self.architecture}.attention.{which}"
        if key in self.fields:
            return self._count(key)
        heads = max(self.head_count)
        if heads == 0:
            raise self._bad(f"damaged GGUF file: neither {key} nor a number of heads")
        return self.embedding_length // heads

    @cached_property
    def key_length(self) -> int:
        """Head size of K."""
        return self._head_size("key_length")

    @cached_property
    def value_length(self) -> int:
        """Head size of V."""
        return self._head_size("value_length")

    @cached_property
    def attention_layers(self) -> list[int]:
        """The layers with KV heads."""
        return [il for il, n in enumerate(self.head_count_kv) if n]

    @property
    def rope_factor(self) -> float:
        """How many times the header stretches the context that the model was first trained on; 1 without scaling."""
        for key in ("rope.scaling.factor", "rope.scale_linear"):
            factor = self.get(f"{self.architecture}.{key}")
            if isinstance(factor, (int, float)) and 0 < factor < 1e30:
                return float(factor)
        return 1.0

    def kv_bytes_per_token(self, k_block: tuple[int, int], v_block: tuple[int, int],
                           without: Collection[int] = ()) -> int | None:
        """Bytes that one cell takes over all layers but ``without``; cache types are the (elements, bytes) of a block.

        None if a row does not divide into blocks. Layers with a sliding window are counted like the others.
        """
        total = 0
        for il, n in enumerate(self.head_count_kv):
            if il in without:
                continue
            for width, (elements, size) in ((n * self.key_length, k_block), (n * self.value_length, v_block)):
                if width % elements:
                    return None
                total += width // elements * size
        return total


def _split_numbers(part: Part) -> list[int | None]:
    """What a file says of the part that it is: its index, how many parts, tensors of all parts; None for nothing."""
    types = {"split.no": U16, "split.count": U16, "split.tensors.count": I32}
    for key, vtype in types.items():
        if key in part.fields and part.fields[key].type != vtype:
            raise EdgekvError(f"{part.path}: damaged GGUF file: {key} has the wrong type")
    return [part.get(key) for key in types]


def _chunks(path: Path, offset: int, n: int) -> Iterator[bytes]:
    """``n`` bytes of a file from ``offset`` on, at most CHUNK at a time. EdgekvError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            f.seek(offset)
            while n:
                data = f.read(min(CHUNK, n))
                if not data:
                    raise EdgekvError(f"{path}: changed while it was read")
                n -= len(data)
                yield data
    except OSError as e:
        raise EdgekvError(f"{path}: cannot be read: {e.strerror or e}") from None


def _decode(data: bytes, at: int, vtype: int) -> tuple[Any, int]:
    """The value at ``at`` and the offset behind it; the parser has checked all lengths."""
    if vtype == STRING:
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
        return data[at + 8:end].decode("utf-8", "replace"), end
    if vtype in SCALARS:
        code = "<" + SCALARS[vtype]
        return struct.unpack_from(code, data, at)[0], at + struct.calcsize(code)
    item_type, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item_type in SCALARS:
        array = np.frombuffer(data, "<" + SCALARS[item_type], count, at)
        return array, at + array.nbytes
    items = []
    for _ in range(count):
        item, at = _decode(data, at, item_type)
        items.append(item)
    return items, at
