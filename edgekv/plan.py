"""How much memory a model and its cache will take, from the header of its file: the library behind ``edgekv plan``.

Nothing here loads the native library. What is exact and what is estimated:

- Weights are the bytes of the tensors. K, V, the state of recurrent layers and the summaries of pages are computed as
  the runtime allocates them, to the byte.
- The scratch of evictions follows the graph of the default policy and of ``kvdiff``; for others it is an estimate.
- The compute buffer is the largest of a few moments of the graph (:func:`_moments`): logits, attention, feed-forward.
  The factors were read off what llama.cpp reserves for models of different shapes.

All sizes are bytes, cells and contexts are tokens.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF, TENSOR_TYPES
from edgekv.settings import DEFAULT_POLICY, FLOAT_TYPES, EvictionSettings, needs_filters, needs_queries

GIB = 1 << 30
LADDER = ("f16", "q8_0", "q4_0")  # caches, the most exact first: docs/quality.md says what they cost
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
PAD = 256  # cells are allocated in steps of
MIN_BUDGET = 256  # tokens; below it an eviction is not proposed, as in --kv-evict auto
LEAVE_DISCRETE = GIB  # of a card's memory, for the driver and the screen: llama.cpp's --fit-target
LEAVE_UNIFIED = 4  # one of so many parts is left to the system, as in edgekv.memory

_BLOCKS = {name.lower(): (elements, size) for name, elements, size in TENSOR_TYPES.values()}


# --- the model -----------------------------------------------------------------------------------------------------

# architecture -> (period of the pattern, the layer with full attention comes first, tokens of the window if the header
# does not say); llama.cpp has them in src/models/. The header's own pattern goes before the period.
_WINDOWS: dict[str, tuple[int | None, bool, int | None]] = {
    "gemma2": (2, False, 4096), "gemma3": (6, False, None), "gemma3n": (5, False, None), "gemma4": (None, False, None),
    "cohere2": (4, False, None), "cohere2moe": (4, True, None), "olmo2": (4, False, None),
    "exaone4": (4, False, 4096), "exaone-moe": (4, False, 128), "llama4": (4, False, 8192), "gpt-oss": (2, False, None),
    "smallthinker": (4, True, None), "plamo3": (8, False, None), "muse-glimmer": (4, False, None),
    "afmoe": (4, False, None), "laguna": (4, True, None), "mellum": (4, False, None), "step35": (None, False, None),
    "maple": (None, False, None), "mimo2": (None, False, None), "spark2_5": (None, False, None), "granite_swa": (None, False, None),
}
_FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}  # whatever number the header has, unless it is 0
_NO_WINDOWS = {"phi3"}  # llama.cpp ignores the header's

_ENCODERS = {
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "t5", "t5encoder", "llama-embed", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec",
}
_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
# latent attention, indexers, several caches, drafts of another model
_OTHER_CACHES = {
    "minimax-m3", "minimax-01", "glm-dsa", "deepseek32", "deepseek4", "glm5-next", "hy_v4", "dots3note", "dflash",
    "eagle3", "qwen4exp", "kimi-linear", "kimi-k3", "bailingmoe3", "gemma4-assistant", "graniteswitch",
}
_HYBRIDS = {"jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
            "qwen3next", "qwen35", "qwen35moe"}
_INTERVALS = {"qwen3next", "qwen35", "qwen35moe"}  # say which layers are recurrent by a list or an interval
_M_ROPE = {"qwen2vl", "paddleocr", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3tts"}
_M_ROPE_IF_SECTIONS = {"glm4", "glm4moe", "hunyuan_vl"}
_ALIBI = {"bloom", "refact"}
_INPUTS = {"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"}


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        kind: ``full`` or ``window`` attention with a cache of its own, ``none`` without one (it is recurrent, or reads
            another layer's).
        n_head_kv, head_k, head_v: KV heads and their channels of K and V.
        recurrent_bytes: state of one sequence, float32.
        weight_bytes: its tensors.
    """

    kind: str
    n_head_kv: int
    head_k: int
    head_v: int
    recurrent_bytes: int
    weight_bytes: int

    @property
    def k_width(self) -> int:
        return self.n_head_kv * self.head_k

    @property
    def v_width(self) -> int:
        return self.n_head_kv * self.head_v


@dataclass(frozen=True)
class Model:
    """What a header says of a model, as far as memory goes.

    Attributes:
        layers: all of them, in order.
        v_width_max: channels of V in the widest layer; without flash attention all layers with a cache have as many.
        window: tokens of the sliding window, 0 without one.
        n_head, n_embd, n_ff, n_vocab: widths of activations, the largest over the layers. ``n_ff`` of mixtures counts
            the experts that one token uses, ``n_expert_used`` says how many these are.
        n_mixer: channels that a recurrent layer has at once, 0 without such layers.
        input_bytes: tensors that always stay in main memory. output_bytes: those of the output.
        tied_bytes: of the embeddings, if they are the output too: a GPU gets a copy.
        no_evict, no_select: why the cache cannot be evicted or selected from, or ''.
        notes: for people, what the plan assumes.
    """

    path: Path
    name: str
    architecture: str
    n_ctx_train: int
    layers: tuple[Layer, ...]
    v_width_max: int
    window: int
    n_head: int
    n_embd: int
    n_ff: int
    n_expert_used: int
    n_vocab: int
    n_mixer: int
    input_bytes: int
    output_bytes: int
    tied_bytes: int
    no_evict: str = ""
    no_select: str = ""
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return self.input_bytes + self.output_bytes + sum(layer.weight_bytes for layer in self.layers)

    @property
    def all_layers(self) -> int:
        """``-ngl`` that puts everything on a GPU: the layers and the output."""
        return len(self.layers) + 1


def read_model(gguf: GGUF) -> Model:
    """What the header says.

    Raises:
        EdgekvError: naming the file: the header is damaged, or the model has no cache that a plan could be made for
            (an encoder, a recurrent model, latent or sparse attention).
    """
    arch, bad = gguf.architecture, lambda why: EdgekvError(f"{gguf.path}: {why}")
    if arch in _ENCODERS or gguf.get(f"{arch}.attention.causal") is False:
        raise bad(f"is an encoder or a diffusion model ({arch}): it writes no text token by token, without a KV cache")
    if arch in _RECURRENT:
        raise bad(f"is a recurrent model ({arch}): it has no KV cache, its memory does not grow with the context")
    if (arch in _OTHER_CACHES or _number(gguf, f"{arch}.attention.key_length_mla", 0)
            or _number(gguf, f"{arch}.num_loops", 1) > 1):
        raise bad(f"has latent or sparse attention, or a cache of its own kind ({arch}): no plan can be made for it")

    n_layer = gguf.n_layer
    if n_layer > MAX_LAYERS:
        raise bad(f"has {n_layer} layers, and llama.cpp takes {MAX_LAYERS} at most")
    drafts = min(_number(gguf, f"{arch}.nextn_predict_layers", 0), n_layer - 1)
    notes = []
    windowed, window = _windows(gguf, n_layer, notes)
    recurrent = _recurrent_layers(gguf)
    states = _state_bytes(gguf) if any(recurrent) else 0
    own = _own_caches(gguf, n_layer - drafts)
    head_k = {False: gguf.key_length, True: _number(gguf, f"{arch}.attention.key_length_swa", gguf.key_length)}
    head_v = {False: gguf.value_length, True: _number(gguf, f"{arch}.attention.value_length_swa", gguf.value_length)}
    weights, inputs, outputs = _weights(gguf, n_layer)
    weights[n_layer - drafts:] = [0] * drafts  # loaded for --spec-type draft-mtp only

    layers = []
    for il in range(n_layer):
        w = windowed[il]
        kind = "none" if not own[il] or not gguf.head_count_kv[il] else "window" if w else "full"
        state = states if recurrent[il] else 0
        layers.append(Layer(kind, gguf.head_count_kv[il], head_k[w], head_v[w], state, weights[il]))
    if not any(layer.kind != "none" and layer.k_width for layer in layers):
        raise bad("has no layer with a KV cache")
    if not any(layer.kind == "window" for layer in layers):
        window = 0

    embeddings = gguf.tensors.get("token_embd.weight")
    output = gguf.tensors.get("output.weight", embeddings)
    if embeddings is None or any(len(tensor.shape) != 2 for tensor in (embeddings, output)):
        raise bad("has no token embeddings, or a damaged output; is it a language model, and the first part of it?")
    tied = embeddings.nbytes if output is embeddings else 0
    n_ff = max(_list(gguf, f"{arch}.feed_forward_length", 0))
    n_used = max(_list(gguf, f"{arch}.expert_used_count", 0)) if _number(gguf, f"{arch}.expert_count", 0) > 1 else 0
    if n_used:
        n_ff = max(n_ff, n_used * max(_list(gguf, f"{arch}.expert_feed_forward_length", n_ff)))

    no_evict, no_select = _refusals(gguf, layers)
    n_mixer = _mixer_width(gguf) if any(recurrent) else 0
    return Model(
        gguf.path, gguf.name, arch, gguf.context_length, tuple(layers), max(layer.v_width for layer in layers), window,
        max(gguf.head_count), gguf.embedding_length, n_ff, n_used, output.shape[-1], n_mixer, inputs, outputs, tied,
        no_evict, no_select, tuple(notes))


def _number(gguf: GGUF, key: str, default: int) -> int:
    value = gguf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise EdgekvError(f"{gguf.path}: damaged GGUF file: {key} is not a number, or negative")
    return value


def _list(gguf: GGUF, key: str, default: int) -> list[int]:
    """One number per layer, or one for all."""
    value = gguf.get(key, default)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or len(value) != gguf.n_layer or (value.astype(object) < 0).any():
            raise EdgekvError(f"{gguf.path}: damaged GGUF file: {key} is not one number per layer")
        return [int(v) for v in value]
    return [_number(gguf, key, default)]


def _flags(gguf: GGUF, key: str) -> list[bool] | None:
    """A list of one flag per layer, None if the key is no list."""
    value = gguf.get(key)
    if not isinstance(value, np.ndarray):
        return None
    if len(value) != gguf.n_layer or value.dtype.kind not in "iub":
        raise EdgekvError(f"{gguf.path}: damaged GGUF file: {key} is not one flag per layer")
    return [bool(v) for v in value]


def _windows(gguf: GGUF, n_layer: int, notes: list[str]) -> tuple[list[bool], int]:
    """Which layers have a sliding window, and its tokens."""
    arch, none = gguf.architecture, [False] * n_layer
    key = f"{arch}.attention.sliding_window"
    pattern_key = f"{key}_pattern"
    if arch in ("lfm2", "lfm2moe"):
        window = _number(gguf, key, 0) if arch == "lfm2" else 0
        return ([n > 0 for n in gguf.head_count_kv], window) if window else (none, 0)
    if arch in _NO_WINDOWS:
        return none, 0
    if arch not in _WINDOWS:
        if _number(gguf, key, 0):
            notes.append(f"the header names a sliding window, but not for which layers of {arch}: all are counted "
                         "as full")
        return none, 0
    period, dense_first, default = _WINDOWS[arch]
    if arch == "exaone4" and n_layer - _number(gguf, f"{arch}.nextn_predict_layers", 0) != 64:
        return none, 0
    window = _number(gguf, key, default or 0)
    if window == 0:
        return none, 0
    window = _FIXED_WINDOWS.get(arch, window)
    found = _flags(gguf, pattern_key)
    if found is not None:
        return found, window
    if period is None:
        notes.append(f"the header does not say which layers of {arch} have the sliding window: all are counted as full")
        return none, 0
    if pattern_key in gguf:
        period = _number(gguf, pattern_key, period)
    if period == 0:
        return [True] * n_layer, window
    return [il % period != 0 if dense_first else il % period < period - 1 for il in range(n_layer)], window


def _recurrent_layers(gguf: GGUF) -> list[bool]:
    arch, n_layer = gguf.architecture, gguf.n_layer
    if arch not in _HYBRIDS:
        return [False] * n_layer
    if arch == "falcon-h1":
        return [True] * n_layer
    if arch in _INTERVALS:
        found = _flags(gguf, f"{arch}.attention.recurrent_layers")
        interval = _number(gguf, f"{arch}.full_attention_interval", 4) or 1
        trunk = n_layer - _number(gguf, f"{arch}.nextn_predict_layers", 0)
        return found or [il < trunk and (il + 1) % interval != 0 for il in range(n_layer)]
    n_ff = _list(gguf, f"{arch}.feed_forward_length", 0)
    n_ff = n_ff if len(n_ff) == n_layer and arch.startswith("nemotron") else [0] * n_layer
    return [n == 0 and ff == 0 for n, ff in zip(gguf.head_count_kv, n_ff)]


def _own_caches(gguf: GGUF, trunk: int) -> list[bool]:
    """Which layers have K and V of their own."""
    arch, n_layer = gguf.architecture, gguf.n_layer
    end = trunk
    if arch == "gemma3n":
        end = min(end, 20)
    elif arch == "gemma4":
        end = max(0, min(end, n_layer - _number(gguf, f"{arch}.attention.shared_kv_layers", 0)))
    without = _recurrent_layers(gguf) if arch in _INTERVALS else [False] * n_layer
    if arch.startswith("nemotron"):
        n_ff = _list(gguf, f"{arch}.feed_forward_length", 0)
        without = [ff > 0 for ff in n_ff] if len(n_ff) == n_layer else without
    return [il < end and not without[il] for il in range(n_layer)]


def _state_bytes(gguf: GGUF) -> int:
    """Of one recurrent layer and sequence: the convolution's history and the state, float32."""
    arch = gguf.architecture
    if taps := _number(gguf, f"{arch}.shortconv.l_cache", 0):
        return 4 * gguf.embedding_length * (taps - 1)
    taps, inner, state, groups = (_number(gguf, f"{arch}.ssm.{key}", 0)
                                  for key in ("conv_kernel", "inner_size", "state_size", "group_count"))
    return 4 * (max(0, taps - 1) * (inner + 2 * groups * state) + state * inner)


def _mixer_width(gguf: GGUF) -> int:
    arch = gguf.architecture
    inner, state, groups = (_number(gguf, f"{arch}.ssm.{key}", 0)
                            for key in ("inner_size", "state_size", "group_count"))
    return 7 * gguf.embedding_length if f"{arch}.shortconv.l_cache" in gguf else 5 * inner + 4 * groups * state


def _weights(gguf: GGUF, n_layer: int) -> tuple[list[int], int, int]:
    """Bytes of each layer, of the input, of the output."""
    layers, inputs, outputs = [0] * n_layer, 0, 0
    for t in gguf.tensors.values():
        if t.type not in TENSOR_TYPES:
            raise EdgekvError(f"{gguf.path}: tensor {t.name!r} is of {t.type_name}, whose size is not known here")
        match = re.match(r"blk\.([0-9]{1,4})\.", t.name)
        if match and int(match[1]) < n_layer:
            layers[int(match[1])] += t.nbytes
        elif t.name in _INPUTS:
            inputs += t.nbytes
        elif t.name.startswith(("token_embd_norm", "rope_")) and not gguf.architecture.startswith("lfm2"):
            layers[0] += t.nbytes
        else:
            outputs += t.nbytes
    return layers, inputs, outputs


def _refusals(gguf: GGUF, layers: Sequence[Layer]) -> tuple[str, str]:
    """Why the runtime refuses eviction, and selection; see ``ggml_ops/llama/edgekv-attach.cpp``."""
    arch = gguf.architecture
    both = ""
    if not any(layer.kind == "full" for layer in layers):
        both = "it has no layer with full attention"
    elif arch in _HYBRIDS and any(layer.kind == "window" for layer in layers):
        both = "it is a hybrid with sliding windows"
    elif arch in _ALIBI or _bias(gguf) or (arch == "baichuan" and gguf.n_layer == 40):
        both = "it has ALiBi"
    sections = gguf.get(f"{arch}.rope.dimension_sections")
    m_rope = isinstance(sections, np.ndarray) and len(sections) > 1 and sections[0] > 0 and sections[1] > 0
    if arch in _M_ROPE or (arch in _M_ROPE_IF_SECTIONS and m_rope):
        return both or "it has M-RoPE", both
    return both, both


def _bias(gguf: GGUF) -> bool:
    value = gguf.get(f"{gguf.architecture}.attention.max_alibi_bias", 0)
    return isinstance(value, (int, float)) and value > 0


# --- settings and what they cost -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What one row of a plan is about.

    Attributes:
        n_ctx: tokens of context, of all sequences together; each has its share.
        n_seq: sequences (slots of a server).
        policy, budget: eviction; ``none`` and 0 without.
        page_size: of the summaries of ``--kv-select quest``, 0 without. dense_layers: the first layers, without them.
        swa_full: layers with sliding windows keep the whole context, as in ``edgekv chat`` and the bindings where nothing
            is evicted; ``edgekv run`` and the server keep windows.
        n_gpu_layers: layers on the GPU, the last ones, and before any of them the output.
    """

    n_ctx: int
    n_seq: int = 1
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    policy: str = "none"
    budget: int = 0
    page_size: int = 0
    dense_layers: int = 2
    swa_full: bool = True
    n_gpu_layers: int = 0

    @property
    def n_ctx_seq(self) -> int:
        """Tokens of each sequence, as llama.cpp rounds them."""
        return _pad(_pad(self.n_ctx) // self.n_seq)

    @property
    def ubatch(self) -> int:
        """Tokens computed at once, at most."""
        return min(self.n_ubatch, self.n_ctx)

    @property
    def cells(self) -> int:
        """Of each sequence and layer with full attention."""
        if self.policy == "none":
            return self.n_ctx_seq
        return min(self.n_ctx_seq, _pad(min(self.n_ctx_seq, self.budget + self.ubatch)))

    def window_cells(self, window: int) -> int:
        """Of each sequence and layer with a sliding window of ``window`` tokens."""
        kept = 0
        if self.policy != "none":
            kept = EvictionSettings.resolve(self.policy, self.budget, n_ctx=self.n_ctx_seq).window
        elif self.swa_full:
            return self.n_ctx_seq
        return _pad(min(self.n_ctx_seq, window + self.ubatch + kept))


@dataclass(frozen=True)
class Bytes:
    """Memory in one place. ``k`` and ``v`` are of layers with full attention, ``windows`` K and V of those with sliding
    windows; ``scratch`` is reserved for evictions, ``compute`` for the graph and its results."""

    weights: int = 0
    k: int = 0
    v: int = 0
    windows: int = 0
    recurrent: int = 0
    summaries: int = 0
    scratch: int = 0
    compute: int = 0

    @property
    def kv(self) -> int:
        """The cache, all kinds, without summaries."""
        return self.k + self.v + self.windows + self.recurrent

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Memory:
    """What a setting takes: ``device`` on the GPU, ``host`` in main memory."""

    cells: int
    window_cells: int
    device: Bytes
    host: Bytes

    @property
    def all(self) -> Bytes:
        return self.device + self.host


def memory(model: Model, setting: Setting) -> Memory:
    """What the runtime will allocate.

    Raises:
        EdgekvError: the cache's type does not go with the model's head size, or the model's cache cannot be evicted or
            selected from.
    """
    s = setting
    if why := _unfit(model, s):
        raise EdgekvError(f"{model.path}: {why}")
    n_gpu = min(s.n_gpu_layers, model.all_layers) if s.n_gpu_layers >= 0 else model.all_layers
    first = len(model.layers) + 1 - n_gpu  # the first layer on the GPU

    cells, window_cells = s.cells, s.window_cells(model.window) if model.window else 0
    places = {True: Bytes(), False: Bytes()}
    scratch = {True: 0, False: 0}  # of the graph of an eviction: layers use it one after the other
    for il, layer in enumerate(model.layers):
        there = il >= first
        found = Bytes(weights=layer.weight_bytes, recurrent=layer.recurrent_bytes * s.n_seq)
        if layer.kind != "none":
            n = (cells if layer.kind == "full" else window_cells) * s.n_seq
            k = _row(layer.k_width, s.type_k) * n
            v = _row(layer.v_width if s.flash_attn else model.v_width_max, s.type_v) * n
            if layer.kind == "window":
                found += Bytes(windows=k + v)
            else:
                found += Bytes(k=k, v=v)
        if layer.kind == "full":
            if s.page_size and il >= s.dense_layers:  # the least and largest of each channel, float16
                found += Bytes(summaries=2 * 2 * layer.k_width * -(-cells // s.page_size) * s.n_seq)
            if s.policy != "none":
                kept, used = _scratch(layer, s, cells)
                found += Bytes(scratch=kept)
                scratch[there] = max(scratch[there], used)
        places[there] += found

    places[False] += Bytes(weights=model.input_bytes)
    places[n_gpu > 0] += Bytes(weights=model.output_bytes)
    if n_gpu > 0:
        places[True] += Bytes(weights=model.tied_bytes)
    on_gpu, on_cpu = _compute(model, s, cells, window_cells, n_gpu)
    places[True] += Bytes(scratch=scratch[True], compute=on_gpu)
    places[False] += Bytes(scratch=scratch[False], compute=on_cpu + 4 * model.n_vocab * s.n_seq)
    return Memory(cells, window_cells, places[True], places[False])


def token_bytes(model: Model, setting: Setting) -> int:
    """K and V of one token in the layers that are evicted from, for budgets in bytes."""
    return sum(_row(layer.k_width, setting.type_k) + _row(layer.v_width, setting.type_v)
               for layer in model.layers if layer.kind == "full")


def _pad(cells: int) -> int:
    return -(-cells // PAD) * PAD


def _row(width: int, type_name: str) -> int:
    elements, size = _BLOCKS[type_name]
    return width // elements * size


def _unfit(model: Model, s: Setting) -> str:
    """Why the runtime refuses a setting, or ''."""
    for flag, name, heads in (("-ctk", s.type_k, {layer.head_k for layer in model.layers if layer.kind != "none"}),
                              ("-ctv", s.type_v, {layer.head_v for layer in model.layers if layer.kind != "none"})):
        for head in heads:
            if head % _BLOCKS[name][0]:
                return f"{flag} {name} does not go with heads of {head} channels; a type with smaller blocks does"
    if not s.flash_attn and s.type_v not in FLOAT_TYPES:
        return f"-ctv {s.type_v}: a quantised V needs flash attention, drop -fa off"
    if s.policy != "none" and model.no_evict:
        return f"the cache cannot be evicted from: {model.no_evict}; --kv-evict none"
    if s.budget and needs_queries(s.policy) and not EvictionSettings.resolve(
            s.policy, s.budget, n_ctx=s.n_ctx_seq).window:
        return f"--kv-evict {s.policy} needs a --kv-budget of at least 4 tokens"
    if s.page_size and model.no_select:
        return f"the cache cannot be selected from: {model.no_select}; --kv-select none"
    if s.page_size and not s.flash_attn:
        return "--kv-select quest needs flash attention: drop -fa off"
    return ""


def _scratch(layer: Layer, s: Setting, cells: int) -> tuple[int, int]:
    """What an eviction holds for a layer all the time, and what its graph takes while it runs."""
    scores = 4 * cells * layer.n_head_kv
    kept = 4 * min(s.budget, cells) * layer.n_head_kv
    if needs_filters(s.policy):
        kept += 4 * layer.k_width
    if "recency" in s.policy.split("+") or s.policy == "random":
        kept += scores
    used = 3 * scores + 4 * layer.k_width
    if not s.flash_attn and "kvdiff" in s.policy.split("+"):  # V lies transposed: its rows are copied
        used += _row(layer.v_width, s.type_v) * cells
    return kept, used


def _moments(model: Model, s: Setting, cells: int, window_cells: int, layers: Sequence[Layer]) -> tuple[int, int, int]:
    """Bytes of activations while a full ubatch goes through these layers: the masks, and beside them what attention and
    feed-forward hold at most."""
    t = 4 * s.ubatch  # bytes of a channel
    layers = [layer for layer in layers if layer.kind != "none"]
    q = max((layer.head_k for layer in layers), default=0) * model.n_head
    kv = max((layer.k_width + layer.v_width for layer in layers), default=0)
    used = [n for n, kind in ((cells, "full"), (window_cells, "window")) if any(layer.kind == kind for layer in layers)]
    masks = s.ubatch * sum(used) * (2 if s.flash_attn else 4)
    attention = t * (3 * q + kv)
    if not s.flash_attn:
        attention += t * model.n_head * max(used, default=0)
    elif layers and "f32" in (s.type_k, s.type_v):  # cast for every layer anew
        widths = [max(x.k_width for x in layers)] if s.type_k == "f32" else []
        widths += [max(x.v_width for x in layers)] if s.type_v == "f32" else []
        attention += 2 * max(used) * s.n_seq * sum(widths)
    forward = t * max(3 * model.n_ff + q, 2 * model.n_expert_used * model.n_embd - 3 * model.n_embd,
                      model.n_mixer - 3 * model.n_embd)
    return masks, attention, forward


def _compute(model: Model, s: Setting, cells: int, window_cells: int, n_gpu: int) -> tuple[int, int]:
    """Compute buffers of the GPU and of main memory."""
    e = 4 * s.ubatch * model.n_embd
    logits = 4 * s.ubatch * model.n_vocab
    first = len(model.layers) + 1 - n_gpu
    # the masks are made in main memory, wherever the layers are
    masks, *_ = _moments(model, s, cells, window_cells, model.layers)
    _, attention, forward = _moments(model, s, cells, window_cells, model.layers[:first])
    here = masks + max(attention + 2 * e, forward + 3 * e)
    if n_gpu == 0:
        return 0, max(here, logits + 3 * e)
    there = logits + e
    if n_gpu > 1:
        masks_there, attention, forward = _moments(model, s, cells, window_cells, model.layers[first:])
        there = max(there, masks_there + max(attention + e, forward + 2 * e))
    return there, here if first > 0 else masks + 2 * e


# --- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A GPU or a machine: ``kind`` is ``discrete`` or ``unified``, ``memory`` bytes, ``bandwidth`` GB/s or None."""

    name: str
    title: str
    kind: str
    memory: int
    bandwidth: float | None = None
    source: str = ""

    def room(self, leave: int | None = None) -> int:
        """Bytes that a model may fill; ``leave`` is what stays free, by default 1 GiB of a card and a quarter of memory
        that the system lives in too."""
        if leave is None:
            leave = LEAVE_DISCRETE if self.kind == "discrete" else self.memory // LEAVE_UNIFIED
        return max(0, self.memory - leave)

    def needs(self, found: Memory) -> int:
        """Bytes of it that a plan takes."""
        return found.all.total if self.kind == "unified" else found.device.total


@cache
def devices() -> tuple[Device, ...]:
    """The table in ``edgekv/data/devices.csv``, one entry per size of memory."""
    with open(Path(__file__).parent / "data" / "devices.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    result = []
    for row in rows:
        sizes = row["memory_gib"].split("/")
        for size in sizes:
            many = len(sizes) > 1
            result.append(Device(f"{row['name']}-{size}gb" if many else row["name"],
                                 f"{row['title']} {size} GB" if many else row["title"], row["kind"], int(size) * GIB,
                                 float(row["bandwidth_gb_s"]) if row["bandwidth_gb_s"] else None, row["source"]))
    return tuple(result)


def find_device(text: str) -> Device:
    """A card or machine by name (``rtx4060``, ``RX 7900 XTX``, ``m4-24gb``), or a card of some size (``8GiB``).

    A card sold with 8 GB has 8 GiB: GB and GiB mean the same here.

    Raises:
        EdgekvError: naming --gpu and the nearest names.
    """
    if match := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([gm])(?:i?b)?", text.strip().lower()):
        size = int(float(match[1]) * (GIB if match[2] == "g" else 1 << 20))
        if size == 0:
            raise EdgekvError(f"--gpu {text}: must be larger than nothing")
        return Device(text.strip(), f"a card with {text.strip()}", "discrete", size)
    wanted = _plain(text)
    known = {_plain(device.name): device for device in devices()}
    if wanted in known:
        return known[wanted]
    sizes = [device.name for device in devices() if re.fullmatch(re.escape(wanted) + r"[0-9]+gb", _plain(device.name))]
    if wanted and sizes:
        raise EdgekvError(f"--gpu {text}: there are several sizes, choose {', '.join(sizes)}")
    close = [known[name].name for name in difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)]
    near = f"the nearest names are {', '.join(close)}" if close else "edgekv plan without --gpu lists the names"
    raise EdgekvError(f"--gpu {text}: not in the table of machines; {near}; or give a size, such as 8GiB")


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    makers = {"nvidia", "geforce", "amd", "radeon", "intel", "arc", "apple", "jetson"}
    return "".join(word for word in words if word not in makers)


# --- what fits -------------------------------------------------------------------------------------------------------


def largest_budget(model: Model, setting: Setting, fits: Callable[[Memory], bool]) -> int:
    """The largest budget of ``setting``'s policy whose cells are used to the last one and that fits; 0 if none of at
    least MIN_BUDGET tokens does."""
    def at(steps: int) -> int:
        return steps * PAD - setting.ubatch

    low, high = -(-(MIN_BUDGET + setting.ubatch) // PAD) - 1, setting.n_ctx_seq // PAD
    first = low
    while low < high:  # low fits or is below the least
        middle = (low + high + 1) // 2
        if fits(memory(model, replace(setting, budget=at(middle)))):
            low = middle
        else:
            high = middle - 1
    return at(low) if low > first else 0


def most_layers(model: Model, setting: Setting, room: int) -> int:
    """The largest ``-ngl`` whose part on the GPU fits ``room`` bytes; 0 if not even the output does."""
    # the weights alone are a bound; below it no bisection: with one layer more the compute buffer can change either way
    weights = accumulate((layer.weight_bytes for layer in reversed(model.layers)),
                         initial=model.output_bytes + model.tied_bytes)
    most = sum(total <= room for total in weights)
    return next((n for n in range(most, 0, -1)
                 if memory(model, replace(setting, n_gpu_layers=n)).device.total <= room), 0)


@dataclass(frozen=True)
class Proposal:
    """What to run. ``fits`` is False where nothing does; ``why`` is a line for people."""

    setting: Setting
    memory: Memory
    fits: bool
    why: str


def ladder(model: Model, base: Setting, types: Sequence[str]) -> list[Setting]:
    """``base`` with each of these cache types that the runtime takes."""
    found = [replace(base, type_k=name, type_v=name) for name in types]
    return [s for s in found if not _unfit(model, s)]


def propose(model: Model, caches: Sequence[Setting], device: Device, leave: int | None = None,
            policy: str = DEFAULT_POLICY) -> list[Proposal]:
    """The best setting that fits ``device``, and the other way if there is one.

    A cache that loses nothing or little goes first: docs/quality.md. So the full cache in the first type that fits;
    else the last type, evicted to the largest budget that fits. The alternative to that is to leave layers to the CPU.

    Args:
        caches: settings with the full cache, the most exact first; all layers on the GPU.
        policy: to evict by, ``none``: not at all.
    """
    room = device.room(leave)

    def fits(found: Memory) -> bool:
        return device.needs(found) <= room

    def name(s: Setting) -> str:
        return s.type_k if s.type_k == s.type_v else f"{s.type_k} (K) and {s.type_v} (V)"

    for s in caches:
        found = memory(model, s)
        if fits(found):
            return [Proposal(s, found, True, f"the full cache fits, in {name(s)}")]

    result = []
    if policy != "none" and not model.no_evict:
        s = replace(caches[-1], policy=policy)
        if budget := largest_budget(model, s, fits):
            s = replace(s, budget=budget)
            result.append(Proposal(s, memory(model, s), True,
                                   f"no full cache fits; in {name(s)} the best {budget:,} tokens of "
                                   f"{s.n_ctx_seq:,} are kept"))
    if device.kind == "discrete":
        s = next((s for s in caches if s.type_k == "q8_0"), caches[0])
        n = most_layers(model, s, room)
        s = replace(s, n_gpu_layers=n)
        found = memory(model, s)
        where = f"{n} of {model.all_layers} layers on the GPU" if n else "no layer on the GPU"
        result.append(Proposal(s, found, True, f"nothing is evicted, with {where} and {_gib(found.host.total)} in main "
                               f"memory: slower; cache in {name(s)}"))
    elif not result:
        s = caches[-1]
        why = ("no cache of this context fits, and nothing may be evicted: a smaller -c may"
               if policy == "none" or model.no_evict else
               f"not even {MIN_BUDGET} tokens in {name(s)} fit: a smaller -ub or model may")
        result.append(Proposal(s, memory(model, s), False, why))
    return result


def _gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB"


def flags(setting: Setting, *, server: bool = False) -> list[str]:
    """The options of ``edgekv run`` (or ``serve``) that make a setting, but for defaults."""
    s = setting
    result = ["-c", str(s.n_ctx), "-ngl", str(s.n_gpu_layers)]
    if server:
        result += ["-np", str(s.n_seq)]
    if s.n_ubatch != 512:
        result += ["-b", str(s.n_ubatch)] if s.n_ubatch > 512 else []
        result += ["-ub", str(s.n_ubatch)]
    if not s.flash_attn:
        result += ["-fa", "off"]
    elif s.n_gpu_layers == 0 and s.type_v in FLOAT_TYPES and not s.page_size:  # auto would leave it off
        result += ["-fa", "on"]
    for flag, name in (("-ctk", s.type_k), ("-ctv", s.type_v)):
        result += [flag, name] if name != "f16" else []
    result += ["--kv-evict", s.policy]
    if s.policy != "none":
        result += ["--kv-budget", str(s.budget)]
    if s.page_size:
        result += ["--kv-select", "quest"]
        result += ["--kv-page-size", str(s.page_size)] if s.page_size != 16 else []
        result += ["--kv-dense-layers", str(s.dense_layers)] if s.dense_layers != 2 else []
    return result
