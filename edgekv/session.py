"""A model and one context, driven batch by batch: what calibration, benchmarks and tests need below ``Llama``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekv import native, rpc
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.settings import EvictionSettings, RopeSettings, SelectionSettings

import llama_cpp

if TYPE_CHECKING:
    from typing import Self

CACHE_TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16, which the bindings do not name
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q5_1": llama_cpp.GGML_TYPE_Q5_1,
    "q5_0": llama_cpp.GGML_TYPE_Q5_0,
    "q4_1": llama_cpp.GGML_TYPE_Q4_1,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
    "iq4_nl": llama_cpp.GGML_TYPE_IQ4_NL,
}


def load_model(path: str | os.PathLike[str], *, n_gpu_layers: int | None = None, rpc_servers: str | Sequence[str] = (),
               vocab_only: bool = False):
    """A ``llama_model`` pointer; see :class:`edgekv.Llama` for the arguments. ``vocab_only``: without the weights.

    Raises:
        EdgekvError: llama.cpp refuses the file, or a server cannot be used; names which.
    """
    if not Path(path).is_file():
        raise EdgekvError(f"{path}: no such file")
    native.silence()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = rpc.gpu_layers(n_gpu_layers, rpc_servers)
    params.vocab_only = vocab_only
    if rpc_servers:
        devices = rpc.devices(rpc_servers)
        params.devices = ctypes.addressof(devices)
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EdgekvError(f"{path}: cannot be loaded: {native.log_error() or 'llama.cpp refused it'}")
    return model


class Vocabulary:
    """The tokenizer of a model file, without its weights. EdgekvError, naming the file, if it cannot be loaded."""

    model = None

    def __init__(self, path: str | os.PathLike[str]):
        self._hold(load_model(path, vocab_only=True))

    def _hold(self, model) -> None:
        self.model = model
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """``special``: begun, and ended, as the model's texts are."""
        data = text.encode()
        n = len(data) + 8
        for _ in range(2):  # a negative result is the size that was needed
            out = (llama_cpp.llama_token * abs(n))()
            n = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), special, False)
            if n >= 0:
                break
        else:
            raise EdgekvError("the text cannot be tokenised")
        return list(out[:n])

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without special ones."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        for _ in range(2):  # a negative result is the size that was needed
            out = ctypes.create_string_buffer(room)
            n = llama_cpp.llama_detokenize(self.vocab, ids, len(ids), out, room, False, False)
            if n >= 0:
                break
            room = -n
        return out.raw[: max(n, 0)].decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Session(Vocabulary):
    """A context on a model of its own, with as many streams as sequences.

    Args:
        n_ctx: tokens of context per sequence.
        n_gpu_layers, rpc_servers: see :func:`load_model`.
        offload_kqv: the cache of layers that are elsewhere is there too.
        settings, filters, selection, tap_queries: see :func:`edgekv.native.set_next`.
        rope: how positions are stretched; default: as the model says.

    Raises:
        EdgekvError: the model cannot be loaded or the context cannot be created.
    """

    ctx = _batch = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int,
        n_ubatch: int = 512,
        n_batch: int | None = None,
        n_threads: int | None = None,
        n_seq_max: int = 1,
        flash_attn: bool = False,
        type_k: str = "f16",
        type_v: str = "f16",
        n_gpu_layers: int | None = None,
        rpc_servers: str | Sequence[str] = (),
        offload_kqv: bool = True,
        settings: EvictionSettings | None = None,
        filters: QFilters | None = None,
        selection: SelectionSettings | None = None,
        tap_queries: bool = False,
        rope: RopeSettings | None = None,
    ):
        self._hold(load_model(path, n_gpu_layers=n_gpu_layers, rpc_servers=rpc_servers))

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq_max
        params.n_batch = n_batch or n_ubatch
        params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq_max
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.type_k, params.type_v = CACHE_TYPES[type_k], CACHE_TYPES[type_v]
        params.offload_kqv = offload_kqv
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        for name, value in (rope or RopeSettings()).params().items():
            setattr(params, name, value)
        self.per_query_head = selection is not None and selection.per_query_head
        native.set_next(settings, filters, selection, tap_queries)
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise EdgekvError(f"{path}: {native.last_error() or native.log_error() or 'the context could not be created'}")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_batch = params.n_batch
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def decode(self, tokens, pos: int, seq_id: int = 0, logits: str | int = "none") -> np.ndarray | None:
        """Decode one batch.

        Args:
            tokens: at most ``n_batch`` token ids, read at the positions from ``pos`` on.
            logits: ``none``, ``last``, ``all``, or of how many of the last tokens.

        Returns:
            float32 ``[n, n_vocab]`` for the tokens asked for (a copy), None if there are none.

        Raises:
            EdgekvError: llama_decode failed (the context is full, ...).
        """
        code = self.try_decode(tokens, pos, seq_id, logits)
        if code != 0:
            raise EdgekvError(native.last_error() or f"llama_decode returned {code}")
        if (n := _n_logits(logits, len(tokens))) == 0:
            return None
        raw = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(raw, shape=(n, self.n_vocab)).copy()

    def try_decode(self, tokens, pos: int, seq_id: int = 0, logits: str | int = "none") -> int:
        """As :meth:`decode`; returns the code of llama_decode."""
        batch, n = self._batch, len(tokens)
        if n > self.n_batch:
            raise ValueError(f"{n} tokens in a batch of {self.n_batch}")
        first = n - _n_logits(logits, n)  # with logits
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq_id
            batch.logits[i] = i >= first
        native.clear_error()
        return llama_cpp.llama_decode(self.ctx, batch)

    def read(self, tokens, pos: int = 0, seq_id: int = 0, each=lambda n: None) -> None:
        """Decode any number of tokens in batches of ``n_batch``; ``each`` is told how many a batch had."""
        for i in range(0, len(tokens), self.n_batch):
            chunk = tokens[i : i + self.n_batch]
            self.decode(chunk, pos + i, seq_id)
            each(len(chunk))

    def remove(self, p0: int, p1: int = -1, seq_id: int = 0) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, seq_id, p0, p1))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def evict(self, seq_id: int = 0, budget: int = 0) -> int:
        return native.evict(self.ctx, seq_id, budget)

    def evict_as(self, settings: EvictionSettings, filters: QFilters | None = None, seq_id: int = 0,
                 scores: list[np.ndarray] | None = None) -> int:
        """Evict one sequence by other settings than the context's own, whose mode must be ``prompt``: policies are compared
        on copies of one sequence that was read once.

        Args:
            scores: for the policy ``given``: float32 ``[n_head_kv, n_used]`` per cache layer, higher means keep.

        Returns the tokens that left each KV head. EdgekvError if the settings, filters or scores do not fit.
        """
        return native.evict_as(self.ctx, settings, filters, scores, seq_id)

    def copy(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Copy a sequence. Void upstream: :func:`edgekv.native.last_error` says if it was refused."""
        native.clear_error()
        llama_cpp.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def save(self, seq_id: int | None = None) -> bytes:
        """The state of one sequence, or of the whole context. EdgekvError if it cannot be saved."""
        if seq_id is None:
            return native.save_state(self.ctx).tobytes()
        native.clear_error()
        size = llama_cpp.llama_state_seq_get_size(self.ctx, seq_id)
        blob = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data(self.ctx, blob, size, seq_id) != size:
            raise EdgekvError(native.last_error() or "the state cannot be saved")
        return bytes(blob)

    def load(self, state: bytes, seq_id: int | None = None) -> None:
        """Restore a state; EdgekvError if it does not belong here, with the cache untouched."""
        if seq_id is None:
            native.load_state(self.ctx, np.frombuffer(state, np.uint8))
            return
        native.clear_error()
        blob = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if llama_cpp.llama_state_seq_set_data(self.ctx, blob, len(state), seq_id) == 0:
            raise EdgekvError(native.last_error() or "the state is damaged or belongs to another context")

    def stats(self, seq_id: int = -1) -> native.CacheStats:
        return native.stats(self.ctx, seq_id)

    def positions(self, i_layer: int, i_head_kv: int, seq_id: int = 0) -> np.ndarray:
        return native.positions(self.ctx, seq_id, i_layer, i_head_kv)

    def rows(self, i_layer: int, i_head_kv: int, seq_id: int = 0, *, values: bool) -> np.ndarray:
        return native.rows(self.ctx, seq_id, i_layer, i_head_kv, values=values)

    def layers(self) -> list[native.CacheLayer]:
        return native.layers(self.ctx)

    def close(self) -> None:
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        self.ctx = self._batch = None
        super().close()


def _n_logits(logits: str | int, n_tokens: int) -> int:
    """How many of the last tokens :meth:`Session.decode` gives logits of."""
    n = {"none": 0, "last": 1, "all": n_tokens}.get(logits, logits)
    if not isinstance(n, int) or not 0 <= n <= n_tokens:
        raise ValueError(f"logits {logits!r} of {n_tokens} tokens")
    return n


def default_threads() -> int:
    """As many threads as this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
