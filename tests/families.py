"""Tiny random Hugging Face checkpoints of the attention families, and what transformers computes with them.

``python tests/families.py --table`` converts and measures all of them and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from edgekv import hf
from edgekv.calibrate import calibrate, default_text, token_sequences
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from edgekv.session import Session
from edgekv.settings import EvictionSettings

ROOT = Path(__file__).resolve().parents[1]

N_CTX = 1024  # of every checkpoint
N_TOKENS = 512  # whose keys are ranked, and which are read with evictions
N_SCORED = 256  # the loss is that of the last tokens
BUDGET, WINDOW, KEEP, N_UBATCH = 256, 32, 4, 32


@dataclass(frozen=True)
class Family:
    """A family of attention.

    Attributes:
        special: what sets its attention apart.
        architecture: the class of transformers.
        config: its settings, where they differ from ``COMMON``.
        layers: those with full attention, which are evicted from.
        readers: layers that read another layer's keys and values -> that layer.
        tokenizer: ``spm``, ``spm-bare`` (no space in front of the text) and ``bpe`` are trained on :func:`text`, the
            others rebuilt from the pin's vocabulary of that name.
        tokens: further tokens that the converter looks for.
        published: what config.json of published checkpoints says and transformers does not write.
        predicts: whether published checkpoints have a block behind the layers that predicts a further token.
        unordered: why filters in transformers' order of the channels are refused, '' if they are not.
        refused: why the runtime does not evict, '' if it does.
    """

    special: str
    architecture: str
    config: dict = field(default_factory=dict)
    layers: tuple[int, ...] = (0, 1)
    readers: dict[int, int] = field(default_factory=dict)
    tokenizer: str = "gpt-2"
    tokens: tuple[str, ...] = ()
    published: dict = field(default_factory=dict)
    predicts: bool = False
    unordered: str = ""
    refused: str = ""


COMMON = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=N_CTX, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
DELTA_RULE = dict(head_dim=64, linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=2,
                  linear_num_value_heads=4)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32,
              v_head_dim=32)
UNTIED = dict(tie_word_embeddings=False)  # where llama.cpp wants an output matrix


def _mixed(n_layer: int, period: int, other: str) -> dict:
    """Every ``period``-th layer has full attention."""
    return dict(num_hidden_layers=n_layer,
                layer_types=["full_attention" if il % period == period - 1 else other for il in range(n_layer)])


def _windows(n_layer: int, period: int) -> dict:
    """Every ``period``-th layer has full attention, the others a window of 32 tokens."""
    return dict(_mixed(n_layer, period, "sliding_attention"), sliding_window=32)


FAMILIES = {
    "llama": Family("rows of Q and K permuted, grouped heads", "LlamaForCausalLM", tokenizer="spm"),
    "llama-mha": Family("as many KV heads as query heads", "LlamaForCausalLM", dict(num_key_value_heads=4),
                        tokenizer="spm"),
    "llama-mqa": Family("one KV head", "LlamaForCausalLM", dict(num_key_value_heads=1), tokenizer="spm"),
    "llama3": Family("scaled RoPE frequencies", "LlamaForCausalLM", dict(rope_parameters=dict(
        rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=256)), tokenizer="llama-bpe"),
    "mistral": Family("head size other than hidden size / heads", "MistralForCausalLM",
                      dict(sliding_window=None, head_dim=64), tokenizer="spm"),
    "smollm3": Family("every fourth layer without RoPE", "SmolLM3ForCausalLM",
                      dict(num_hidden_layers=4, pad_token_id=0), (0, 1, 2, 3)),
    "granite": Family("multipliers", "GraniteForCausalLM", dict(
        attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0)),
    "qwen2": Family("biases of Q, K and V", "Qwen2ForCausalLM", tokenizer="qwen2"),
    "qwen3": Family("QK-norm per head", "Qwen3ForCausalLM", dict(head_dim=64)),
    "olmo2": Family("QK-norm over all heads", "Olmo2ForCausalLM", UNTIED),
    "starcoder2": Family("biases, layer norm", "Starcoder2ForCausalLM"),
    "phi3": Family("fused QKV", "Phi3ForCausalLM", dict(pad_token_id=0), tokenizer="spm", tokens=("<|endoftext|>",)),
    "phi2": Family("half of the channels rotate", "PhiForCausalLM",
                   dict(UNTIED, partial_rotary_factor=0.5, num_key_value_heads=4, intermediate_size=512)),
    "stablelm": Family("a quarter of the channels rotates", "StableLmForCausalLM",
                       dict(UNTIED, partial_rotary_factor=0.25)),
    "gpt-neox": Family("fused QKV; a quarter of the channels rotates", "GPTNeoXForCausalLM",
                       dict(UNTIED, rotary_pct=0.25), published=dict(rotary_pct=0.25)),
    "nemotron": Family("half of the channels rotate, grouped heads", "NemotronForCausalLM",
                       dict(UNTIED, partial_rotary_factor=0.5, head_dim=32), tokenizer="spm"),
    "glm4": Family("half of the channels rotate, in pairs", "Glm4ForCausalLM",
                   dict(partial_rotary_factor=0.5, head_dim=32, pad_token_id=0),
                   tokens=("[gMASK]", "<|user|>", "<|observation|>")),
    "minicpm3": Family("K heads of 64, V heads of 32", "MiniCPM3ForCausalLM", LATENT, tokenizer="spm",
                       unordered="is not known (MLA)"),
    "mixtral": Family("experts", "MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2),
                      tokenizer="spm"),
    "qwen3moe": Family("experts, QK-norm", "Qwen3MoeForCausalLM", dict(EXPERTS, head_dim=32, norm_topk_prob=True)),
    "olmoe": Family("experts, QK-norm over all heads", "OlmoeForCausalLM",
                    dict(UNTIED, **EXPERTS, num_key_value_heads=4)),
    "gemma2": Family("windows, soft-cap", "Gemma2ForCausalLM",
                     dict(_windows(4, 2), head_dim=64, query_pre_attn_scalar=64), (1, 3), tokenizer="spm-bare"),
    "gemma3": Family("windows, QK-norm", "Gemma3ForCausalLM",
                     dict(_windows(6, 6), head_dim=64, query_pre_attn_scalar=64), (5,), tokenizer="spm-bare"),
    "gemma4": Family("windows, layers that share KV, larger heads in full attention", "Gemma4ForCausalLM", dict(
        _windows(6, 2), head_dim=32, global_head_dim=64, num_kv_shared_layers=2, hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=512, final_logit_softcapping=30.0), (1, 3), {5: 3}, tokenizer="bpe"),
    "cohere2": Family("windows, full attention without RoPE", "Cohere2ForCausalLM", _windows(4, 4), (3,),
                      published=dict(rotary_pct=1.0)),
    # gpt-oss itself does not round YaRN's bounds, but llama.cpp does
    "gpt-oss": Family("windows, attention sinks, YaRN, experts", "GptOssForCausalLM", dict(
        UNTIED, **_windows(4, 2), head_dim=32, num_local_experts=4, num_experts_per_tok=2, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=256, truncate=True)),
        (1, 3)),
    "lfm2": Family("hybrid: short convolutions", "Lfm2ForCausalLM",
                   dict(_mixed(4, 2, "conv"), block_auto_adjust_ff_dim=False), (1, 3)),
    "jamba": Family("hybrid: Mamba, no RoPE, experts", "JambaForCausalLM", dict(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2), (1, 3),
        tokenizer="spm"),
    "granite-hybrid": Family(
        "hybrid: Mamba 2, experts; rows of Q and K permuted, no RoPE", "GraniteMoeHybridForCausalLM", dict(
            _mixed(4, 2, "linear_attention"), mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, num_local_experts=4,
            num_experts_per_tok=2, shared_intermediate_size=64), (1, 3), tokenizer="spm",
        published=dict(layer_types=["mamba", "attention"] * 2)),
    "falcon-h1": Family("hybrid: Mamba 2 beside attention in every layer", "FalconH1ForCausalLM",
                        dict(mamba_n_heads=8, mamba_d_head=32, mamba_d_ssm=256, mamba_d_state=16, head_dim=32)),
    "qwen3-next": Family("hybrid: gated delta rule; gated attention, QK-norm, experts", "Qwen3NextForCausalLM", dict(
        _mixed(4, 2, "linear_attention"), **EXPERTS, **DELTA_RULE, norm_topk_prob=True,
        shared_expert_intermediate_size=64), (1, 3), predicts=True),
    "qwen3.5": Family("hybrid: gated delta rule; M-RoPE", "Qwen3_5ForCausalLM",
                      dict(_mixed(4, 2, "linear_attention"), **DELTA_RULE), predicts=True,
                      refused="M-RoPE reads positions from the cells"),
    "deepseek2": Family("latent attention (MLA)", "DeepseekV2ForCausalLM", dict(
        LATENT, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1,
        first_k_dense_replace=1), refused="multi-head latent attention is not supported"),
}


# --- checkpoints ---------------------------------------------------------------------------------


def write_checkpoint(family: Family, folder: Path, seed: int = 0):
    """A random model of the family (transformers), written into ``folder`` with a tokenizer."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder.mkdir(parents=True)
    n_vocab = _write_tokenizer(family, folder)
    architecture = getattr(transformers, family.architecture)
    torch.manual_seed(seed)
    model = architecture(architecture.config_class(**{**COMMON, **family.config}, vocab_size=n_vocab)).eval()
    _randomise(model, seed)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **family.published}))
    if family.predicts:
        _add_prediction_block(folder / "model.safetensors", model.config)
    return model


def _randomise(model, seed: int) -> None:
    """Weights with which every KV head has a direction: random ones alone give queries without any.

    All embeddings share a constant part, as those of real models do, so queries have a mean; RoPE leaves it standing in
    the channels that turn slowly. The last norm is small, so that this part does not drive the logits into a soft-cap.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # norms, biases
                p += 0.1 * normal(*p.shape)
                if name.endswith("norm.weight") and ".layers." not in name and len(p) == model.config.hidden_size:
                    p -= 0.85  # from 1, or from 0 where the model adds 1
            elif "embed" in name:
                p.copy_(normal(*p.shape) + 1.5 * normal(p.shape[1]))
            elif p.ndim == 2 or "experts" in name:
                sharper = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
                p.copy_(normal(*p.shape) * sharper * p.shape[-1] ** -0.5)


def _add_prediction_block(path: Path, config) -> None:
    """A block like the last layer, as checkpoints of Qwen3-Next have it; transformers neither reads nor writes it."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(path)
    last, size = f"model.layers.{config.num_hidden_layers - 1}.", config.hidden_size
    weights |= {name.replace(last, "mtp.layers.0."): w for name, w in weights.items() if name.startswith(last)}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights[f"mtp.{name}.weight"] = np.zeros(size, np.float32)
    weights["mtp.fc.weight"] = np.zeros((size, 2 * size), np.float32)
    save_file(weights, path, metadata={"format": "pt"})


# --- tokenizers ----------------------------------------------------------------------------------


@functools.cache
def text() -> str:
    """What tokenizers are trained on, and what is calibrated with and measured on: Python's help, as far as needed."""
    return default_text()[:20_000]


N_TRAINED = 512  # tokens of a vocabulary that is trained


def _write_tokenizer(family: Family, folder: Path) -> int:
    """Returns the number of tokens."""
    from tokenizers import AddedToken, Tokenizer

    if family.tokenizer.startswith("spm"):
        (folder / "tokenizer.model").write_bytes(_sentencepiece(family.tokenizer == "spm"))
        added = {token: N_TRAINED + i for i, token in enumerate(family.tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        config = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        n = N_TRAINED + len(added)
    else:
        saved, begin = (_trained_bpe() if family.tokenizer == "bpe" else _rebuilt_bpe(family.tokenizer))
        tokenizer = Tokenizer.from_str(saved)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=begin, eos_token=begin)
        n = tokenizer.get_vocab_size()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return n


@functools.cache
def _sentencepiece(space_in_front: bool) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()), model_writer=out, model_type="bpe", vocab_size=N_TRAINED,
        byte_fallback=True, add_dummy_prefix=space_in_front, remove_extra_whitespaces=False,
        normalization_rule_name="identity", num_threads=1, minloglevel=2)
    return out.getvalue()


@functools.cache
def _trained_bpe() -> tuple[str, str]:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=N_TRAINED, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text().splitlines(), trainer)
    return tokenizer.to_str(), "<s>"


# pre-tokenizers as regular expressions, which differ in the number of digits; GPT-2's own is built into `tokenizers`
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
_SPLITS = {"llama-bpe": _SPLIT % "{1,3}", "qwen2": _SPLIT % ""}


@functools.cache
def _rebuilt_bpe(name: str) -> tuple[str, str]:
    """tokenizer.json of the vocabulary that the pin has under that name, and its beginning-of-text token.

    The converter knows it by the ids that it gives to a text, so it must tokenise exactly as the original.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, merges, kinds, begin = _vocabulary(name)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [tuple(merge.split(" ")) for merge in merges], ignore_merges=name == "llama-bpe"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    split = [pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")] if name in _SPLITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(f"{tokens[begin]} $A",
                                                                 special_tokens=[(tokens[begin], begin)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of tokens that stand for no text
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)
                          for token, kind in zip(tokens, kinds) if kind == control])
    return tokenizer.to_str(), tokens[begin]


def _vocabulary(name: str) -> tuple:
    """Tokens, merges, types of the tokens and number of the beginning-of-text token, from the pinned source."""
    fetch = [sys.executable, ROOT / "tools/llama_source.py", "fetch"]
    archive = subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with tarfile.open(archive) as tar, tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        member = next(m for m in tar if m.name.endswith(f"/vendor/llama.cpp/models/ggml-vocab-{name}.gguf"))
        shutil.copyfileobj(tar.extractfile(member), file)
        file.flush()
        fields = GGUF(file.name)
        return tuple(fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type", "bos_token_id"))


# --- what transformers computes ------------------------------------------------------------------


_see: Callable | None = None  # who is told what passes through the attention of the model that runs


def run(model, tokens: list[int], see: Callable, n_logits: int = 0) -> np.ndarray | None:
    """A forward pass over one text in which ``see(il, query, key)`` gets the queries ``[n_head, n, d]`` and keys
    ``[n_head_kv, n, d]`` of each attention layer, post-RoPE, in transformers' channel order. It may return bool
    ``[n_head_kv, n, n]``: which keys (last axis) a query must not see, beside those that it does not see anyway.

    Returns float32 ``[n_logits, n_vocab]``, the logits of the last tokens, if asked for.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    global _see
    AttentionInterface.register("edgekv_test", _attention)
    AttentionMaskInterface.register("edgekv_test", AttentionMaskInterface()["eager"])
    model.set_attn_implementation("edgekv_test")
    _see = see
    try:
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            if n_logits:
                return model(input_ids=ids, use_cache=False).logits[0, -n_logits:].numpy()
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        _see = None


def _attention(module, query, key, value, mask, **kwargs):
    import torch

    gone = _see(module.layer_idx, query[0].numpy(), key[0].numpy())
    if gone is not None:
        gone = torch.from_numpy(gone).repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        mask = mask.masked_fill(gone, torch.finfo(mask.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


def direction(queries: np.ndarray, group: int) -> np.ndarray:
    """Filters (arXiv 2503.02812, section 3) from queries ``[n_head, n, d]``: float64 ``[n_head / group, d]``."""
    found = []
    for q in queries.astype(np.float64):
        u = np.linalg.svd(q, full_matrices=False)[2][0]
        found.append(u if q.mean(axis=0) @ u > 0 else -u)
    return np.mean(np.reshape(found, (-1, group, len(u))), axis=1)


def evict(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rule of docs/eviction.md for one KV head that reads tokens with these scores, ubatch by ubatch.

    Returns bool ``[n, n]``, which keys (last axis) a query no longer finds, and the positions that are left.
    """
    n = len(scores)
    gone, left = np.zeros((n, n), bool), np.arange(0)
    for at in range(0, n, N_UBATCH):
        if len(left) > BUDGET:  # with the ubatch: more than budget + ubatch
            best = sorted(left[KEEP:-WINDOW], key=lambda pos: (scores[pos], pos))[KEEP + WINDOW - BUDGET :]
            left = np.concatenate([left[:KEEP], np.sort(best), left[-WINDOW:]])
            gone[at:, :at] = True
            gone[at:, left] = False
        left = np.concatenate([left, np.arange(at, min(at + N_UBATCH, n))])
    return gone, left


# --- both sides ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evicted:
    """A text read with evictions, on both sides by filters of their own.

    Attributes:
        loss, loss_transformers: mean negative log-likelihood of the last ``N_SCORED`` tokens.
        alike: the share of positions that both sides have kept, in the worst KV head.
        layers: those that were evicted from.
    """

    loss: float
    loss_transformers: float
    alike: float
    n_evictions: int
    layers: list[int]


class Case:
    """A family's checkpoint, its GGUF, and what the runtime and transformers make of the same tokens.

    All matrices, keys and values are F32, so that only the method counts. Layers are those that are evicted from.
    """

    def __init__(self, family: Family, folder: Path):
        self.family, self.folder, self.path = family, folder / "checkpoint", folder / "model.gguf"
        self.model = write_checkpoint(family, self.folder)
        self.text_file = folder / "text.md"
        self.text_file.write_text(text())

    def convert(self) -> Case:
        hf.to_gguf(self.folder, self.path, "f32")
        return self

    def session(self, settings: EvictionSettings | None = None) -> Session:
        return Session(self.path, n_ctx=N_TOKENS, n_ubatch=N_UBATCH, n_threads=1, type_k="f32", type_v="f32",
                       settings=settings, filters=self.filters if settings and settings.policy == "qfilters" else None)

    @cached_property
    def filters(self) -> QFilters:
        return calibrate(self.path, text_files=[self.text_file], n_threads=1)

    @cached_property
    def sequences(self) -> list[list[int]]:
        """The tokens that calibration reads; of the first sequence ``N_TOKENS`` are ranked and read with evictions."""
        with self.session() as session:
            return token_sequences(session, [text()], N_CTX, "text()")

    @property
    def tokens(self) -> list[int]:
        return self.sequences[0][:N_TOKENS]

    @property
    def targets(self) -> list[int]:
        return self.sequences[0][1 : N_TOKENS + 1]

    @cached_property
    def keys(self) -> dict[int, np.ndarray]:
        """The runtime's cached keys, float32 ``[n_head_kv, N_TOKENS, d]`` by layer."""
        with self.session() as session:
            session.read(self.tokens)
            return {layer.il: np.stack([session.rows(i, h, values=False).view(np.float32)
                                        for h in range(layer.n_head_kv)]) for i, layer in enumerate(session.layers())}

    @cached_property
    def transformers(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Transformers' filters ``[n_head_kv, d]`` and keys ``[n_head_kv, N_TOKENS, d]`` by layer."""
        queries, keys = {}, {}

        def see(il, q, k):
            il = self.family.readers.get(il, il)
            if il in self.family.layers:
                queries.setdefault(il, []).append(q)
                keys.setdefault(il, k[:, :N_TOKENS])

        for tokens in self.sequences:
            run(self.model, tokens, see)
        return {il: (direction(np.concatenate(queries[il], axis=1), len(queries[il][0]) // len(keys[il])), keys[il])
                for il in sorted(keys)}

    def spearman(self, filters: QFilters) -> list[float]:
        """Rank correlation of the runtime's keys on these filters with transformers' keys on its own, per KV head."""
        vectors = dict(zip(filters.layers, filters.vectors))
        return [rank_correlation(self.keys[il][h] @ vectors[il][h], keys[h] @ theirs[h])
                for il, (theirs, keys) in self.transformers.items() for h in range(len(keys))]

    @cached_property
    def full_losses(self) -> tuple[float, float]:
        """As in :class:`Evicted`, with the full cache: the runtime's, transformers'."""
        with self.session() as session:
            return self._loss(session), self._loss_transformers(lambda il, q, k: None)

    @cached_property
    def evicted(self) -> Evicted:
        filters, left = {il: vectors for il, (vectors, _) in self.transformers.items()}, {}

        def see(il, q, k):
            il = self.family.readers.get(il, il)
            if il in filters:
                heads = [evict(keys.astype(np.float64) @ u) for keys, u in zip(k, filters[il])]
                left[il] = [positions for _, positions in heads]
                return np.stack([gone for gone, _ in heads])

        loss_transformers = self._loss_transformers(see)
        with self.session(EvictionSettings("qfilters", BUDGET, WINDOW, KEEP)) as session:
            loss = self._loss(session)
            layers = [layer.il for layer in session.layers()]
            alike = min(len(np.intersect1d(session.positions(i, h), positions)) / len(positions)
                        for i, il in enumerate(layers) for h, positions in enumerate(left[il]))
            return Evicted(loss, loss_transformers, alike, session.stats().n_evictions, layers)

    def _loss(self, session: Session) -> float:
        losses = []
        for at in range(0, N_TOKENS, N_UBATCH):
            ubatch = slice(at, at + N_UBATCH)
            logits = session.decode(self.tokens[ubatch], at, logits="all" if at >= N_TOKENS - N_SCORED else "none")
            if logits is not None:
                losses.append(nll(logits, self.targets[ubatch]))
        return float(np.mean(losses))

    def _loss_transformers(self, see: Callable) -> float:
        return float(np.mean(nll(run(self.model, self.tokens, see, N_SCORED), self.targets[-N_SCORED:])))


def nll(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """Negative log-likelihood of each target, float64 ``[n]``."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1)
    return np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(targets)), targets]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; there are no ties."""
    return float(np.corrcoef(*(np.argsort(np.argsort(x)) for x in (a, b)))[0, 1])


def table() -> None:
    import torch

    torch.set_num_threads(1)
    print("| family | attention | evicted layers | least Spearman | kept alike | loss, full cache | evicted | evicted, "
          "transformers |\n|---|---|---|--:|--:|--:|--:|--:|")
    for name, family in FAMILIES.items():
        row = f"| {name} (`{family.architecture}`) | {family.special} | "
        if family.refused:
            print(f"{row}refused: {family.refused} | | | | | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = Case(family, Path(folder)).convert()
            spearman, found = min(case.spearman(case.filters)), case.evicted
            layers = f"{', '.join(map(str, found.layers))} of {case.model.config.num_hidden_layers}"
            losses = case.full_losses[0], found.loss, found.loss_transformers
            losses = " | ".join(f"{loss:.4f}" for loss in losses)
            print(f"{row}{layers} | {spearman:.4f} | {found.alike:.3f} | {losses} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", required=True, help="print what test_families.py measures")
    parser.parse_args()
    table()
