"""``edgekv.Llama``: the bindings' ``Llama`` on a KV cache that can be evicted and selected from."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgekv import filters as qfilters_module
from edgekv import media, native, rpc
from edgekv.checkpoints import Checkpoint, Checkpoints, common_prefix
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.memory import default_cache_ram
from edgekv.settings import EvictionSettings, SelectionSettings, needs_filters, needs_queries

import llama_cpp

_log = logging.getLogger("edgekv")
_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_MIB = 1 << 20


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` with eviction and selection; every argument of it keeps its meaning.

    ``n_ctx`` is the context that can be filled, not the cells that are allocated: with ``kv_evict`` in the default
    mode the cache holds ``kv_budget + n_ubatch`` tokens per KV head, however long the context.

    An evicted cache cannot go back further than its floor. So before an eviction would raise it past a turn's
    beginning or end, the state is kept as a checkpoint, and a prompt that begins like an earlier one (the same
    document with another question, an answer to be given again, an edited last turn) goes on from there.

    Args:
        kv_evict: ``none`` (byte for byte the stock runtime) or one of ``edgekv.settings.POLICIES``.
        kv_budget: tokens kept by an eviction: ``2048``, ``"x8"`` (context / 8) or ``"1.5GiB"``.
        kv_window: last tokens, always kept (default ``min(256, budget / 4)``).
        keep: first tokens, always kept (default 4).
        kv_evict_mode: ``bounded`` evicts by itself; ``prompt`` only when :meth:`evict` is called, and saves no memory.
        qfilters: filters to use instead of those in the model's file.
        selection: what a decode step reads of the cache: ``"none"``, ``"quest"`` or :class:`SelectionSettings`. It needs
            flash attention, which is turned on then.
        cache_ram: MiB for checkpoints, 0: none (default a quarter of the free memory, at most 8192).
        rpc_servers: ``"HOST:PORT,..."``, or a list: layers and their caches live in these ``edgekv rpc-server``, all of
            them unless ``n_gpu_layers`` says how many of the last. If one dies, llama.cpp aborts the process.
        chat_handler: one of the bindings' handlers of images (``llama_cpp.llama_chat_format``), of a model with a
            projector; not with ``kv_evict``.

    Attributes:
        timings: of the last completion, under llama-server's names; also in the answers of ``create_completion`` and
            ``create_chat_completion`` (of a stream, in its last chunk). ``cache_n`` tokens of the prompt were not read
            again.
        on_progress: called with (tokens read, tokens to read) while a prompt is read.
        on_notice: called with a line for people, say that a document has to be read again.

    Raises:
        EdgekvError: a setting is wrong, a server cannot be used, the file has no filters (``edgekv convert
            --with-qfilters`` adds them) or the model's cache cannot be evicted from.
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
        selection: SelectionSettings | str = "none",
        cache_ram: int | None = None,
        rpc_servers: str | Sequence[str] = (),
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
            bytes_per_token=bytes_per_token(gguf, kv_budget, kwargs.get("type_k"), kwargs.get("type_v")),
        )
        projector = media.projector_of(kwargs.get("chat_handler"))
        if projector is not None:
            media.check_handler(projector, self.eviction.policy)
        self.filters = load_filters(gguf, qfilters) if needs_filters(self.eviction.policy) else None
        if isinstance(selection, str):
            selection = SelectionSettings.resolve(selection)
        if not isinstance(selection, SelectionSettings):
            raise EdgekvError(f"selection={selection!r}: give 'none', 'quest' or SelectionSettings")
        self.selection = selection
        if self.selection.needs_flash_attention and not kwargs.setdefault("flash_attn", True):
            raise EdgekvError("selection needs flash attention: drop flash_attn=False")

        self._devices = None
        if rpc_servers:
            kwargs.setdefault("n_gpu_layers", -1)
            self._devices = rpc.devices(rpc_servers)

        if needs_queries(self.eviction.policy):
            cache_ram = 0  # a state does not have them
        if cache_ram is None:
            cache_ram = default_cache_ram()
        self.checkpoints = Checkpoints(cache_ram * _MIB)
        self.timings: dict[str, float] = {}
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.on_notice: Callable[[str], None] = _log.info
        self._evicts = self.eviction.policy != "none"
        self._boundaries: set[int] = set()  # where somebody may want to come back to; no checkpoint has them yet
        self._message_start: int | None = None  # of the last message of the chat that is about to be read
        self._interrupted = threading.Event()
        self._to_read = self._n_read = 0

        if not verbose:
            native.silence()
        native.set_next(self.eviction, self.filters, self.selection)
        try:
            super().__init__(model_path, n_ctx=n_ctx, verbose=verbose, **kwargs)
        except ValueError as error:
            # the bindings know only that it failed
            why = native.last_error() or native.log_error() or str(error)
            raise EdgekvError(f"{model_path}: {why}") from error
        finally:
            native.clear_next()
        if not verbose:
            native.silence()
            if projector is not None:
                native.silence_media()

    @property
    def model_params(self):
        """The bindings' parameters of the model, with the devices of the servers, for which they have no argument."""
        return self._model_params

    @model_params.setter
    def model_params(self, params) -> None:
        if self._devices is not None:
            params.devices = ctypes.addressof(self._devices)
        self._model_params = params

    # --- the cache ---------------------------------------------------------------------------------------------------

    def stats(self) -> native.CacheStats:
        """Figures of the KV cache: cells, tokens seen, evictions, bytes, what selection read and how long it took."""
        return native.stats(self.ctx)

    def evict(self, budget: int = 0) -> int:
        """Evict now, down to ``budget`` tokens per KV head (0: the context's own). Returns how many left each head."""
        if self._evicts and self.stats().cells_used > (budget or self.eviction.budget):
            self._save_boundaries()
        return native.evict(self.ctx, 0, budget)

    def set_keep(self, n_keep: int) -> None:
        """Keep the first ``n_keep`` tokens from the next eviction on, say a system prompt."""
        native.set_keep(self.ctx, n_keep)

    def kept_positions(self, layer: int, kv_head: int) -> np.ndarray:
        """True positions of the tokens that this cache layer and KV head hold, int32, ascending."""
        return native.positions(self.ctx, 0, layer, kv_head)

    # --- reading prompts ---------------------------------------------------------------------------------------------

    def read(self, tokens: list[int]) -> int:
        """Make the cache hold exactly these tokens, from a checkpoint if one helps. The end is a place to come back to.

        Returns how many of them were not read again.

        Raises:
            EdgekvError: they exceed the context.
        """
        try:
            return self._read(tokens)
        finally:
            self._to_read = 0

    def _read(self, tokens: list[int], n_behind: int = 0) -> int:
        """As :meth:`read`, where ``n_behind`` tokens more will be read: they count for the progress."""
        wanted = np.array(tokens, dtype=np.intc)
        if len(wanted) > self._n_ctx:
            raise EdgekvError(f"{len(wanted)} tokens exceed the context of {self._n_ctx}")
        reused = self._go_back(wanted)
        self._n_read, self._to_read = 0, len(wanted) - reused + n_behind
        ends = [len(wanted)]
        if self._evicts:
            # where the message begins, and where a question behind a document may
            likely = {self._message_start or 0, len(wanted) - self.context_params.n_ubatch}
            ends = [*sorted(n for n in likely if reused < n < len(wanted)), len(wanted)]
            floor = self.stats().floor
            self._boundaries.update(n for n in ends if not self.checkpoints.covers(wanted[:n], floor))
        for end in ends if self._is_hybrid else ends[-1:]:
            if self.n_tokens < end:
                self.eval(wanted[self.n_tokens : end].tolist())
            if self._is_hybrid:  # its state cannot be cut back to here later
                self._save_boundaries()
        return reused

    def _go_back(self, tokens: np.ndarray) -> int:
        """Cut the cache back to the longest possible beginning of ``tokens``, or restore a checkpoint; its length."""
        self._take_stock()
        here = self._served_here(tokens)
        found, there = self.checkpoints.best(tokens)

        # among equals the one that was evicted from least: an answer given again is the same one then
        if found is None or (here, -self.stats().floor) >= (there, -found.floor):
            if any(b - here > self.context_params.n_ubatch for b in self._boundaries):
                self._save_boundaries()  # another conversation, which may come back
        else:
            self._save_boundaries()
            if self._restore(found):
                here = there
            else:
                return self._go_back(tokens)  # it is gone, the next best will do
        self._notice_reading_again(tokens, here)
        self._cut(here)
        return here

    def _take_stock(self) -> None:
        """After an exception the cache may hold more than was counted, or less."""
        seen = self.stats().tokens_seen
        if self.n_tokens and seen != self.n_tokens and not (seen > self.n_tokens and self._remove(self.n_tokens)):
            self.n_tokens = 0
        if self.n_tokens == 0:
            self._boundaries.clear()

    def _remove(self, p0: int) -> bool:
        # sequence 0, not -1: a recurrent half takes -1 for everything or nothing
        return bool(llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), 0, p0, -1))

    def _cut(self, n: int) -> None:
        if not self._remove(n):
            raise EdgekvError(native.last_error() or f"the cache cannot be cut back to {n} tokens")
        self._boundaries = {b for b in self._boundaries if b <= n}
        if n != self.n_tokens:
            self._requires_eval = True
        self.n_tokens = n

    def _restore(self, checkpoint: Checkpoint) -> bool:
        try:
            native.load_state(self.ctx, checkpoint.state)
        except EdgekvError as error:
            self.checkpoints.drop(checkpoint)
            self.on_notice(f"a checkpoint could not be restored: {error}")
            return False
        self.checkpoints.touch(checkpoint)
        self._set_tokens(checkpoint.tokens)
        return True

    def _set_tokens(self, tokens: np.ndarray) -> None:
        self.n_tokens = len(tokens)
        self.input_ids[: len(tokens)] = tokens
        self._requires_eval = True
        self._boundaries.clear()

    def _save_boundaries(self) -> None:
        """Keep the state as a checkpoint if it is the last one that has some place in reach."""
        if not self._boundaries or not self.n_tokens:
            return
        floor = self.stats().floor
        reached = frozenset(b for b in self._boundaries if floor <= b <= self.n_tokens)
        self._boundaries = {b for b in self._boundaries if b > self.n_tokens}
        if not reached or not self.checkpoints.limit:
            return
        if llama_cpp.llama_state_get_size(self.ctx) > self.checkpoints.limit:
            return  # before there is a second copy of the cache
        try:
            self.checkpoints.add(Checkpoint(self._input_ids.copy(), floor, reached, native.save_state(self.ctx)))
        except (EdgekvError, MemoryError) as error:  # going back will cost more, going on must not fail
            self.on_notice(f"a checkpoint could not be made: {str(error) or 'out of memory'}")

    def _notice_reading_again(self, tokens: np.ndarray, reused: int) -> None:
        known = max([common_prefix(self._input_ids, tokens), *(common_prefix(c.tokens, tokens) for c in self.checkpoints)])
        if known - reused > self.context_params.n_ubatch:
            self.on_notice(f"{known - reused:,} tokens are read again: no checkpoint goes back to where the prompt "
                           "differs (--cache-ram gives them more room)")

    def eval(self, tokens) -> None:
        """Read tokens behind those that the cache holds; see ``llama_cpp.Llama.eval``.

        Raises:
            KeyboardInterrupt: :meth:`interrupt` was called; what was read so far stays.
        """
        step = self.context_params.n_ubatch if self._evicts else self.n_batch
        for i in range(0, len(tokens), step):
            chunk = tokens[i : i + step]
            if self._interrupted.is_set():
                self._interrupted.clear()
                raise KeyboardInterrupt
            if self._boundaries and self._eviction_due(len(chunk)):
                self._save_boundaries()
            super().eval(chunk)
            self._n_read += len(chunk)
            if self._to_read:
                self.on_progress(min(self._n_read, self._to_read), self._to_read)

    def _eviction_due(self, n_tokens: int) -> bool:
        if self.eviction.mode != "bounded":
            return False
        return self.stats().cells_used + n_tokens > self.eviction.budget + self.context_params.n_ubatch

    def interrupt(self) -> None:
        """Stop reading or answering before the next batch, with KeyboardInterrupt; may be called by a signal handler."""
        self._interrupted.set()

    # --- answering ---------------------------------------------------------------------------------------------------

    def generate(self, tokens, *args, **kwargs) -> Iterator[int]:
        """See ``llama_cpp.Llama.generate``. With eviction the last token of the prompt is read by itself, so that an
        answer begun from a checkpoint is the one that was begun there first."""
        call = _GENERATE.bind(self, list(tokens), *args, **kwargs)
        call.apply_defaults()
        tokens = call.arguments["tokens"]
        began = time.perf_counter()
        self._interrupted.clear()
        self._n_read, self._to_read, n_answer, read, answer = 0, len(tokens), 0, None, None
        try:
            if self._evicts and call.arguments["reset"] and tokens:
                self._read(tokens[:-1], n_behind=1)
                call.arguments.update(tokens=tokens[-1:], reset=False)
            elif call.arguments["reset"]:
                self._to_read -= self._served_here(np.array(tokens[:-1], dtype=np.intc))
            answer = super().generate(*call.args[1:], **call.kwargs)
            sent = None
            while True:
                try:
                    token = answer.send(sent)
                except StopIteration:
                    return
                if read is None:
                    read, self._to_read, n_prompt = time.perf_counter(), 0, self._n_read
                n_answer += 1
                self._time(len(tokens), n_prompt, read - began, n_answer, time.perf_counter() - read)
                sent = yield token
        finally:
            if answer is not None:
                answer.close()
            self._to_read = 0
            self._message_start = None

    def _served_here(self, tokens: np.ndarray) -> int:
        """How many of these tokens the cache holds and can be cut back to."""
        shared = common_prefix(self._input_ids, tokens)
        return shared if shared == self.n_tokens or shared >= self.stats().floor else 0

    def _time(self, n_tokens: int, n_prompt: int, prompt_s: float, n_answer: int, answer_s: float) -> None:
        # the first token of an answer comes with the prompt
        self.timings = {
            "cache_n": n_tokens - n_prompt,
            "prompt_n": n_prompt,
            "prompt_ms": prompt_s * 1e3,
            "prompt_per_second": n_prompt / max(prompt_s, 1e-9),
            "predicted_n": n_answer,
            "predicted_ms": answer_s * 1e3,
            "predicted_per_second": (n_answer - 1) / answer_s if n_answer > 1 else 0.0,
        }

    def create_completion(self, *args, **kwargs):
        """See ``llama_cpp.Llama.create_completion``; the answer has ``timings``."""
        return self._with_timings(super().create_completion(*args, **kwargs))

    def create_chat_completion(self, messages, *args, **kwargs):
        """See ``llama_cpp.Llama.create_chat_completion``; the answer has ``timings``.

        Raises:
            EdgekvError: a message has an image or sound that nothing here can read.
        """
        messages = self._readable(messages)
        if self._evicts:
            self._message_start = self._find_message_start(messages, kwargs)
        try:
            return self._with_timings(super().create_chat_completion(messages, *args, **kwargs))
        except ValueError as error:
            projector = media.projector_of(self.chat_handler)
            if projector is None or not str(error).startswith("Failed to load mtmd context"):
                raise
            why = media.why_not(native.logged())
            raise EdgekvError(f"chat_handler: {projector}: cannot be used with {self.model_path}: {why}") from error

    def _with_timings(self, answer):
        if isinstance(answer, dict):
            answer["timings"] = self.timings
            return answer
        return self._stream_with_timings(answer)

    def _stream_with_timings(self, chunks):
        for chunk in chunks:
            if chunk["choices"] and chunk["choices"][0].get("finish_reason") is not None:
                chunk = {**chunk, "timings": self.timings}
            yield chunk

    # --- chats -------------------------------------------------------------------------------------------------------

    def _readable(self, messages: list[dict]) -> list[dict]:
        """The messages as the chat's format reads them.

        Raises:
            EdgekvError: one has a part that would be dropped, or printed as Python prints it.
        """
        projector = media.projector_of(self.chat_handler)
        if projector is not None:
            if self._evicts:  # it was set later
                raise media.refuse_eviction("chat_handler", f"kv_evict={self.eviction.policy!r}")
            media.check_kinds(messages, ("text", "image_url"), f"edgekv serve MODEL --mmproj {projector} takes sound")
        elif self.chat_handler is None and media.kinds(messages):
            media.check_kinds(messages, ("text",), "drop it, or give a multimodal model's projector: "
                              "chat_handler=Llava15ChatHandler(clip_model_path=...), or edgekv serve MODEL --mmproj FILE")
            if self._reads_strings():
                return media.joined(messages)
        return messages

    def _reads_strings(self) -> bool:
        """Whether the chat's format takes a text for a content. Most know nothing else; a few know lists of parts only."""
        try:
            a, b = (self.chat_tokens([{"role": "user", "content": word}]) for word in ("a", "0"))
        except Exception:  # it wants other messages: nothing is known then
            return True
        return a != b

    def chat_tokens(self, messages: list[dict], **template) -> list[int]:
        """The tokens that :meth:`create_chat_completion` would read for these messages (and ``tools``, ...)."""
        messages = self._readable(messages)

        class Captured(Exception):
            pass

        def capture(*_args, prompt, **_kwargs):
            raise Captured(prompt)

        # whichever handler formats the messages, it ends in create_completion
        self.create_completion = capture
        try:
            super().create_chat_completion(messages, **template)
        except Captured as captured:
            prompt = captured.args[0]
            return list(prompt) if not isinstance(prompt, str) else self.tokenize(prompt.encode(), special=True)
        finally:
            del self.create_completion
        raise EdgekvError("the chat format reads no prompt")

    def system_tokens(self, messages: list[dict]) -> int:
        """How many of the first tokens do not depend on what the user says after these messages."""
        return len(self.document_tokens(messages, ""))

    def document_tokens(self, messages: list[dict], text: str, role: str = "user", **template) -> list[int]:
        """The tokens that a message behind these has in common with every other one that begins with ``text``."""
        a, b = (np.array(self.chat_tokens([*messages, {"role": role, "content": text + word}], **template))
                for word in ("a", "0"))
        return a[: common_prefix(a, b)].tolist()

    def _find_message_start(self, messages, options: dict) -> int | None:
        """Where the last message begins, if the format can be asked."""
        template = {k: options[k] for k in ("functions", "function_call", "tools", "tool_choice") if k in options}
        try:
            return len(self.document_tokens(messages[:-1], "", messages[-1]["role"], **template))
        except Exception:  # a format of images, a template that wants other roles: then there is no such place
            return None

    # --- states ------------------------------------------------------------------------------------------------------

    def save_state(self) -> llama_cpp.LlamaState:
        """See ``llama_cpp.Llama.save_state``. Logits are part of it only with ``logits_all``."""
        state = native.save_state(self.ctx)
        scores = self._scores.copy() if self._logits_all else self.scores[:0]
        return llama_cpp.LlamaState(self.input_ids.copy(), scores, self.n_tokens, state.tobytes(), len(state), self._seed)

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """See ``llama_cpp.Llama.load_state``.

        Raises:
            EdgekvError: the state is damaged or belongs to another model, policy, budget or kind of cache; nothing has
                changed then.
        """
        self.restore(state.input_ids[: state.n_tokens], np.frombuffer(state.llama_state, np.uint8))
        self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    def restore(self, tokens: np.ndarray, state: np.ndarray) -> None:
        """Go on from a state of :func:`edgekv.native.save_state` and the tokens that the cache had read then.

        Raises:
            EdgekvError: as :meth:`load_state`.
        """
        native.load_state(self.ctx, state)
        self._set_tokens(tokens)

    def reset(self) -> None:
        super().reset()
        self._boundaries.clear()

    def __del__(self) -> None:
        # an argument may have been refused before the bindings set anything up
        if hasattr(self, "_stack"):
            try:
                super().__del__()
            except ValueError:  # a handler of images wants to silence a standard output that is closed by now
                pass

    def __getstate__(self):
        raise EdgekvError("edgekv.Llama cannot be pickled: create it anew in the other process")


def load_filters(gguf: GGUF, given: qfilters_module.QFilters | None = None) -> qfilters_module.QFilters:
    """The filters given, or those in the model's file, checked against the model."""
    found = given or qfilters_module.read(gguf)
    if found is None:
        raise EdgekvError(f"{gguf.path}: has no Q-Filters: run `edgekv convert {gguf.path} --with-qfilters`")
    found.validate(gguf)
    return found


def bytes_per_token(gguf: GGUF, budget: int | str | None, type_k: int | None, type_v: int | None) -> int:
    """What one token costs in the layers that are evicted from; 0 if the budget is not in bytes."""
    if not str(budget or "").strip().lower().endswith("b"):
        return 0
    blocks = [native.type_block(llama_cpp.GGML_TYPE_F16 if t is None else t) for t in (type_k, type_v)]
    return gguf.kv_bytes_per_token(*blocks, without=window_layers(gguf)) or 0


def window_layers(gguf: GGUF) -> list[int]:
    """The layers that have a sliding window, which are not evicted from."""
    return native.swa_layers(gguf.path) if f"{gguf.architecture}.attention.sliding_window" in gguf else []


def window_tokens(gguf: GGUF, default: int) -> int:
    """How many tokens such a layer's window has; ``default`` if the header does not say it in a plain number."""
    n = gguf.get(f"{gguf.architecture}.attention.sliding_window")
    return n if isinstance(n, int) and n > 0 else default
