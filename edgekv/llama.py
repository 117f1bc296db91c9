"""``edgekv.Llama``: the bindings' ``Llama`` on a KV cache that can be evicted."""

from __future__ import annotations

import os

import numpy as np

from edgekv import filters as qfilters_module
from edgekv import native, session
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.settings import EvictionSettings

import llama_cpp


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` with eviction; every argument of it keeps its meaning.

    ``n_ctx`` is the context that can be filled, not the cells that are allocated: with ``kv_evict`` in the default
    mode the cache holds ``kv_budget + n_ubatch`` tokens per KV head, however long the context.

    Args:
        kv_evict: ``none`` (byte for byte the stock runtime), ``qfilters``, ``streaming``, ``knorm`` or ``keydiff``.
        kv_budget: tokens kept by an eviction: ``2048``, ``"x8"`` (context / 8) or ``"1.5GiB"``.
        kv_window: last tokens, always kept (default ``min(256, budget / 4)``).
        keep: first tokens, always kept (default 4).
        kv_evict_mode: ``bounded`` evicts by itself; ``prompt`` only when :meth:`evict` is called, and saves no memory.
        qfilters: filters to use instead of those in the model's file.

    Raises:
        EdgekvError: a setting is wrong, the file has no filters (``edgekv convert --with-qfilters`` adds them) or the
            model's cache cannot be evicted from.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_evict: str = "none",
        kv_budget: int | str | None = None,
        kv_window: int | None = None,
        keep: int | None = None,
        kv_evict_mode: str = "bounded",
        qfilters: qfilters_module.QFilters | None = None,
        n_ctx: int = 512,
        verbose: bool = False,
        **kwargs,
    ):
        model_path = os.fspath(model_path)
        gguf = GGUF(model_path)
        self.eviction = EvictionSettings.resolve(
            kv_evict,
            kv_budget,
            kv_window,
            keep,
            kv_evict_mode,
            n_ctx=n_ctx or gguf.context_length,
            bytes_per_token=_bytes_per_token(gguf, kwargs.get("type_k"), kwargs.get("type_v")),
        )
        flat = None
        if self.eviction.policy == "qfilters":
            flat = load_filters(gguf, qfilters).flat()

        if not verbose:
            session.silence()
        native.set_next(self.eviction, flat)
        try:
            super().__init__(model_path, n_ctx=n_ctx, verbose=verbose, **kwargs)
        except ValueError as error:
            # the bindings know only that it failed
            why = native.last_error() or session.log_error() or str(error)
            raise EdgekvError(f"{model_path}: {why}") from error
        finally:
            native.clear_next()
        if not verbose:
            session.silence()

    def stats(self) -> native.CacheStats:
        """Figures of the KV cache: cells, tokens seen, evictions, bytes."""
        return native.stats(self.ctx)

    def evict(self, budget: int = 0) -> int:
        """Evict now, down to ``budget`` tokens per KV head (0: the context's own). Returns how many left each head."""
        return native.evict(self.ctx, 0, budget)

    def set_keep(self, n_keep: int) -> None:
        """Keep the first ``n_keep`` tokens from the next eviction on, say a system prompt."""
        native.set_keep(self.ctx, n_keep)

    def kept_positions(self, layer: int, kv_head: int) -> np.ndarray:
        """True positions of the tokens that this cache layer and KV head hold, int32, ascending."""
        return native.positions(self.ctx, 0, layer, kv_head)

    def chat_tokens(self, messages: list[dict]) -> list[int]:
        """The tokens that :meth:`create_chat_completion` would read for these messages."""

        class Captured(Exception):
            pass

        def capture(*_args, prompt, **_kwargs):
            raise Captured(prompt)

        # whichever handler formats the messages, it ends in create_completion
        self.create_completion = capture
        try:
            self.create_chat_completion(messages)
        except Captured as captured:
            prompt = captured.args[0]
            return list(prompt) if not isinstance(prompt, str) else self.tokenize(prompt.encode(), special=True)
        finally:
            del self.create_completion
        raise EdgekvError("the chat format reads no prompt")

    def system_tokens(self, messages: list[dict]) -> int:
        """How many of the first tokens do not depend on what the user says after these messages."""
        a, b = (self.chat_tokens([*messages, {"role": "user", "content": word}]) for word in ("a", "0"))
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

    def save_state(self):
        self._refuse_state()
        return super().save_state()

    def load_state(self, state) -> None:
        self._refuse_state()
        super().load_state(state)

    def _refuse_state(self) -> None:
        if self.eviction.policy != "none":
            raise EdgekvError("the state of a context with eviction cannot be saved or loaded yet")

    def __del__(self) -> None:
        # an argument may have been refused before the bindings set anything up
        if hasattr(self, "_stack"):
            super().__del__()

    def __getstate__(self):
        raise EdgekvError("edgekv.Llama cannot be pickled: create it anew in the other process")


def load_filters(gguf: GGUF, given: qfilters_module.QFilters | None = None) -> qfilters_module.QFilters:
    """The filters given, or those in the model's file, checked against the model."""
    found = given or qfilters_module.read(gguf)
    if found is None:
        raise EdgekvError(f"{gguf.path}: has no Q-Filters: run `edgekv convert {gguf.path} --with-qfilters`")
    found.validate(gguf)
    return found


def _bytes_per_token(gguf: GGUF, type_k: int | None, type_v: int | None) -> int:
    blocks = [native.type_block(llama_cpp.GGML_TYPE_F16 if t is None else t) for t in (type_k, type_v)]
    return gguf.kv_bytes_per_token(*blocks) or 0
