"""Q-Filters of a Hugging Face checkpoint from its own queries, with torch (arXiv 2503.02812, section 3).

transformers lets anyone register an attention: ours hands the queries and keys on, as they are after RoPE and QK-norm
and before the KV heads are repeated, and then calls the attention that the model would have used.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekv import native
from edgekv.calibrate import SEQUENCE_TOKENS, default_text, read_text, token_sequences
from edgekv.errors import EdgekvError
from edgekv.extras import require
from edgekv.filters import QFilters, from_moments, join_reports, model_fingerprint
from edgekv.gguf_file import GGUF
from edgekv.progress import bar
from edgekv.rope_layout import halves_to_pairs, permuted
from edgekv.session import Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

MIN_CHUNK = 64  # tokens; where these do not fit, the weights hardly do

_INSTEAD = "calibrate on the GGUF instead (drop --calibrate-with torch)"
_TAPPED = "edgekv_"  # + the name of the attention that is called behind the tap
_TAPPABLE = ("eager", "sdpa")  # what transformers chooses by itself

_taps: dict[int, Callable] = {}  # id of a module of a tapped model -> what it tells


@contextmanager
def tapped(model: PreTrainedModel, on_attention: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While this is open, every self-attention of the model's text decoder tells its queries and keys.

    ``on_attention(layer, queries, keys)`` with the layer's number, queries ``[batch, n_head, n_tokens, head_size]`` and
    keys ``[batch, n_head_kv, n_keys, head_size]``, detached, as attention sees them: after RoPE and QK-norm, in
    transformers' channel order, the keys of cached tokens first. What it raises ends the forward pass. Logits do not
    change; not for ``logits_to_keep`` above 1, which Gemma 4 treats by the name of its attention.

    Raises:
        EdgekvError: on leaving, if no attention told anything: the model has one of its own.
    """
    calls = 0

    def tell(module: torch.nn.Module, queries: torch.Tensor, keys: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        on_attention(module.layer_idx, queries.detach(), keys.detach())

    with _registered(model, tell):
        yield
    if not calls:
        raise EdgekvError(f"{model.name_or_path or type(model).__name__}: transformers cannot show the queries of "
                          f"{type(model).__name__}; {_INSTEAD}")


@contextmanager
def _registered(model: PreTrainedModel, tell: Callable) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in _TAPPABLE:
        AttentionInterface.register(_TAPPED + name, _attention)
        # masks go by the attention's name as well
        AttentionMaskInterface.register(_TAPPED + name, AttentionMaskInterface()[name])

    # the towers for images and sound have configurations of other types
    text = model.config.get_text_config(decoder=True)
    owners = [module for module in model.modules() if isinstance(getattr(module, "config", None), type(text))]
    configs = {id(config): config for config in (text, *(module.config for module in owners))}.values()
    before = [(config, config._attn_implementation) for config in configs]
    if other := {name for _, name in before} - set(_TAPPABLE):
        raise ValueError(f"cannot tap the attention {', '.join(map(str, other))}; load the model with {_TAPPABLE}")

    try:
        _taps.update({id(module): tell for module in owners})
        for config, name in before:
            _set_attention(config, _TAPPED + name)
        yield
    finally:
        for config, name in before:
            _set_attention(config, name)
        for module in owners:
            _taps.pop(id(module), None)


def _set_attention(config: PretrainedConfig, name: str) -> None:
    config._attn_implementation = {"": name}  # this one's, not those of configurations inside it


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args, **kwargs):
    """Tell the tap, then do what the model would have done."""
    tell = _taps.get(id(module))  # none for another model that shares the configuration
    if tell is not None and not getattr(module, "is_cross_attention", False) and "Cross" not in type(module).__name__:
        tell(module, query, key)
    name = module.config._attn_implementation.removeprefix(_TAPPED)
    model_file = inspect.unwrap(type(module).forward).__globals__
    ordinary = (model_file["eager_attention_forward"] if name == "eager" else
                model_file["ALL_ATTENTION_FUNCTIONS"][name])
    return ordinary(module, query, key, *args, **kwargs)


def calibrate(
    folder: str | os.PathLike[str],
    gguf: GGUF | str | os.PathLike[str],
    *,
    text_files: Iterable[str | os.PathLike[str]] = (),
    device: str | None = None,
    n_threads: int | None = None,
    progress: bool = False,
) -> QFilters:
    """Filters of a checkpoint for the GGUF file that was converted from it, in the channel order of its cached keys.

    Reads the same tokens as :func:`edgekv.calibrate.calibrate`: the same sequences, by the GGUF's tokenizer. On a GPU
    the weights are 16-bit floats, and sequences that do not fit its memory are read in pieces. Nothing is fetched, and
    no code that the checkpoint brings along is run.

    Args:
        text_files: UTF-8 texts of the user's own.
        device: as torch names it; default: the GPU if there is one.
        n_threads: default: torch's own choice.

    Raises:
        EdgekvError: torch is missing, a file cannot be read, the text is too short, transformers cannot load the
            checkpoint or show its queries, they are not finite, its heads are not those of the GGUF, or the memory of
            the device is too small.
    """
    require("convert", "torch", "transformers", what="--calibrate-with torch")
    import torch
    import transformers

    gguf = gguf if isinstance(gguf, GGUF) else GGUF(gguf)
    pairs = permuted(gguf.architecture)
    files = [Path(file) for file in text_files]
    texts = [read_text(file) for file in files] or [default_text()]
    shapes = {layer.il: layer for layer in native.cache_layers(gguf.path)}
    with Vocabulary(gguf.path) as vocabulary:
        where = ", ".join(map(str, files)) or "the default text"
        sequences = token_sequences(vocabulary, texts, min(SEQUENCE_TOKENS, gguf.context_length), where)

    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads or threads)
    try:
        with _quiet(), torch.inference_mode():
            place, dtype = _device(device)
            model = _load(folder, place, dtype)
            if max(map(max, sequences)) >= model.get_input_embeddings().weight.shape[0]:
                raise EdgekvError(f"{folder}: has fewer tokens than {gguf.path}; it is another model's folder")
            statistics = _Statistics(model, shapes, f"{folder}", gguf.path)
            with bar("calibrating", sum(map(len, sequences)), unit="tokens", show=progress) as advance:
                _read(model, sequences, statistics, advance, f"{folder}")
    finally:
        torch.set_num_threads(threads)

    made = [from_moments(*statistics.layer(il)) for il in shapes]
    vectors = [v for v, _ in made]
    n_tokens = sum(map(len, sequences))
    filters = QFilters(
        [halves_to_pairs(v) for v in vectors] if pairs else vectors,
        list(shapes),
        method=f"calibrated with torch on {place.type} in {str(dtype).removeprefix('torch.')}: top eigenvector of the "
               "uncentred second moment of post-RoPE queries, mean over the group",
        text_sha256=[hashlib.sha256(text.encode()).hexdigest() for text in texts],
        n_tokens=n_tokens,
        n_queries=n_tokens,
        runtime=f"torch {torch.__version__}, transformers {transformers.__version__}",
        model_sha256=model_fingerprint(gguf),
        report=join_reports([report for _, report in made]),
    )
    filters.validate(gguf)
    return filters


class _Statistics:
    """Second moment and sum of the queries of each cache layer and query head, added up on the host in float64."""

    def __init__(self, model: PreTrainedModel, shapes: dict[int, native.CacheLayer], folder: str, gguf: Path):
        self._shapes, self._folder, self._gguf = shapes, folder, gguf
        self._cache_layer = _cache_layers(model)
        self._total: dict[int, list] = {}
        self._pending: dict[int, list] = {}

    def add(self, il: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        il = self._cache_layer.get(il, il)
        if il not in self._shapes:
            return
        n_head, n_tokens, head_size = queries.shape[1:]
        found, want = (n_head, keys.shape[1], head_size), self._shapes[il]
        if found != (want.n_head, want.n_head_kv, want.head_size_k):
            raise EdgekvError(f"{self._folder}: layer {il} has {found[0]} query heads, {found[1]} KV heads of "
                              f"{found[2]} channels, but {self._gguf} has {want.n_head}, {want.n_head_kv} of "
                              f"{want.head_size_k}; it is another model's folder")
        # no double precision on Apple's GPUs
        q = queries.float() if queries.device.type == "mps" else queries.double()
        moment = (q.transpose(-1, -2) @ q).sum(0).cpu().double().numpy()
        total = q.sum((0, 2)).cpu().double().numpy()
        if not (np.isfinite(moment).all() and np.isfinite(total).all()):
            raise EdgekvError(f"{self._folder}: the queries of layer {il} are not finite in {queries.dtype} on "
                              f"{queries.device}; {_INSTEAD}")
        before = self._pending.get(il, (0, 0, 0))
        self._pending[il] = [a + b for a, b in zip(before, (moment, total, len(queries) * n_tokens))]

    def drop(self) -> None:
        """Forget what was added since the last :meth:`keep`."""
        self._pending.clear()

    def keep(self) -> None:
        if missing := self._shapes.keys() - self._pending.keys():
            raise EdgekvError(f"{self._folder}: transformers shows no queries of layer {min(missing)}; {_INSTEAD}")
        for il, new in self._pending.items():
            self._total[il] = [a + b for a, b in zip(self._total.get(il, (0, 0, 0)), new)]
        self._pending.clear()

    def layer(self, il: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """What :func:`edgekv.filters.from_moments` takes."""
        moment, total, n = self._total[il]
        return moment, total, self._shapes[il].n_head // self._shapes[il].n_head_kv, n


def _cache_layers(model: PreTrainedModel) -> dict[int, int]:
    """Layers that attend to another one's keys (Gemma 3n and 4) -> that one: the last before them of their kind."""
    attention = sorted((m for m in model.modules() if hasattr(m, "is_kv_shared_layer") and hasattr(m, "layer_idx")),
                       key=lambda m: m.layer_idx)
    owner, readers = {}, {}
    for m in attention:
        kind = getattr(m, "layer_type", None)
        if m.is_kv_shared_layer:
            readers[m.layer_idx] = owner[kind]
        else:
            owner[kind] = m.layer_idx
    return readers


def _read(model: PreTrainedModel, sequences: list[list[int]], statistics: _Statistics, advance: Callable[[int], None],
          folder: str) -> None:
    """Run the decoder over each sequence, at once or, where memory runs out, in ever smaller pieces."""
    from transformers import PreTrainedModel

    text = type(model.config.get_text_config(decoder=True))
    decoder = next(m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(m.config, text))
    chunk = max(map(len, sequences))
    for tokens in sequences:
        while True:
            done = 0

            def tell(n: int) -> None:
                nonlocal done
                done += n
                advance(n)

            try:
                _read_sequence(decoder, tokens, chunk, statistics, tell)
                break
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
            # outside of the handler, so that the error's traceback no longer holds on to what did not fit
            statistics.drop()
            advance(-done)
            _free_memory(model.device)
            chunk //= 2
            if chunk < MIN_CHUNK or _has_state(model):
                raise EdgekvError(f"{folder}: the memory of {model.device} is too small; {_INSTEAD}")
        statistics.keep()


def _read_sequence(decoder: PreTrainedModel, tokens: list[int], chunk: int, statistics: _Statistics,
                   advance: Callable[[int], None]) -> None:
    import torch

    cache = None
    in_pieces = chunk < len(tokens)
    n_layer = decoder.config.num_hidden_layers
    for at in range(0, len(tokens), chunk):
        piece = tokens[at:at + chunk]
        told = 0

        def on_attention(il: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
            nonlocal told
            statistics.add(il, queries, keys)
            step = len(piece) // n_layer  # a model on a CPU may take minutes for a piece
            advance(step)
            told += step

        with tapped(decoder, on_attention):
            out = decoder(input_ids=torch.tensor([piece], device=decoder.device), past_key_values=cache,
                          use_cache=in_pieces)
        cache = out.past_key_values if in_pieces else None
        advance(len(piece) - told)


def _has_state(model: PreTrainedModel) -> bool:
    """Whether layers carry more from piece to piece than keys and values, which not every model can take up again."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    return model._is_stateful or not {"full_attention", "sliding_attention", "chunked_attention"}.issuperset(kinds)


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # the words of Apple's GPUs, and of the CPU
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def _free_memory(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def _device(name: str | None) -> tuple[torch.device, torch.dtype]:
    """The device, and the type of the weights there. EdgekvError if torch cannot use it."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EdgekvError(f"--device {name}: torch cannot use it: {_line(error)}") from None
    if device.type == "cuda":
        # emulated bfloat16 is slower than half precision
        native_bf16 = torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip
        return device, torch.bfloat16 if native_bf16 else torch.float16
    return device, torch.float16 if device.type == "mps" else torch.float32


def _load(folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a local folder. EdgekvError, naming the folder, if transformers cannot load it."""
    from transformers import AutoConfig, AutoModel

    if not Path(folder).is_dir():
        raise EdgekvError(f"{folder}: no such folder; --calibrate-with torch needs the checkpoint that was converted")
    closed = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(os.fspath(folder), **closed)
        # some versions of transformers leave the soft cap out where nothing is said
        capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
        # without the head, which tells nothing about queries
        model, info = AutoModel.from_pretrained(
            os.fspath(folder), dtype=dtype, attn_implementation="eager" if capped else None, output_loading_info=True,
            **closed)
        model = model.to(device)
    except Exception as error:  # whatever a checkpoint can make transformers raise
        if _out_of_memory(error):
            raise EdgekvError(f"{folder}: does not fit the memory of {device}; {_INSTEAD}") from None
        raise EdgekvError(f"{folder}: transformers cannot load it: {_line(error)}; {_INSTEAD}") from None
    if missing := info["missing_keys"]:
        raise EdgekvError(f"{folder}: has no weights {sorted(missing)[0]}; fetch the whole checkpoint")
    return model


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and bars of transformers off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
