"""Tiny random models that llama.cpp loads and runs: plain, sliding-window pairs, hybrids."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np


def write_tiny_model(path: str | os.PathLike[str], *, n_layer: int = 2, n_embd: int = 64, n_head: int = 4,
                     n_head_kv: int = 2, head_size: int = 32, n_ff: int = 96, n_vocab: int = 320, n_ctx: int = 4096,
                     dtype: str = "f32", tokenizer: str = "spm", seed: int = 0, arch: str = "llama",
                     scale: float = 1.0, n_swa: int = 32) -> Path:
    """Write a random model and return its path; the same arguments give the same bytes.

    ``head_size`` need not be ``n_embd / n_head``. ``dtype`` of the matrices: ``f32`` or ``f16`` (norms are F32 either
    way). ``tokenizer``: ``spm`` (bytes as tokens, so any text has tokens; needs 259 or more) or ``none`` (ids only).
    ``scale`` stretches the Q and K weights: larger makes attention more peaked.

    ``arch``: ``llama``; ``gemma3``, where every second layer has full attention and the others a window of ``n_swa``
    tokens; ``lfm2``, where every second layer has attention (with ``head_size = n_embd / n_head``) and the others a
    short convolution; ``qwen2vl``, with M-RoPE (with ``head_size = n_embd / n_head``).
    """
    convolution = [arch == "lfm2" and il % 2 == 0 for il in range(n_layer)]
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(os.fspath(path), arch)
    w.add_name("tiny")
    w.add_block_count(n_layer)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv([0 if c else n_head_kv for c in convolution] if any(convolution) else n_head_kv)
    w.add_key_length(head_size)
    w.add_value_length(head_size)
    w.add_rope_dimension_count(head_size)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(n_vocab)
    if arch == "gemma3":
        w.add_sliding_window(n_swa)
        w.add_sliding_window_pattern([il % 2 == 0 for il in range(n_layer)])
    if arch == "lfm2":
        w.add_shortconv_l_cache(3)
    if arch == "qwen2vl":
        w.add_rope_dimension_sections([head_size // 4, head_size // 8, head_size // 8, 0])
    if tokenizer == "spm":
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
        kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
        if n_vocab < len(tokens):
            raise ValueError(f"an spm vocabulary needs at least {len(tokens)} tokens")
        tokens += [f"▁w{i}" for i in range(n_vocab - len(tokens))]
        kinds += [gguf.TokenType.NORMAL] * (n_vocab - len(kinds))
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores([-float(i) for i in range(n_vocab)])
        w.add_token_types(kinds)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
    elif tokenizer == "none":
        w.add_tokenizer_model("none")
    else:
        raise ValueError(f"unknown tokenizer {tokenizer!r}")

    matrix_type = {"f32": np.float32, "f16": np.float16}[dtype]

    def matrix(name: str, rows: int, columns: int, factor: float = 1.0) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * (factor / np.sqrt(columns))
        w.add_tensor(name, values.astype(matrix_type))

    def norm(name: str, n: int = n_embd) -> None:
        w.add_tensor(name, 1 + 0.1 * rng.standard_normal(n, dtype=np.float32))

    # the embedding's rows have about unit norm per channel, as if normalised
    matrix("token_embd.weight", n_vocab, n_embd, float(np.sqrt(n_embd)))
    norm("token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight")
    matrix("output.weight", n_vocab, n_embd)
    for il in range(n_layer):
        norm(f"blk.{il}.attn_norm.weight")
        if convolution[il]:
            matrix(f"blk.{il}.shortconv.conv.weight", n_embd, 3)
            matrix(f"blk.{il}.shortconv.in_proj.weight", 3 * n_embd, n_embd)
            matrix(f"blk.{il}.shortconv.out_proj.weight", n_embd, n_embd)
        else:
            matrix(f"blk.{il}.attn_q.weight", n_head * head_size, n_embd, scale)
            matrix(f"blk.{il}.attn_k.weight", n_head_kv * head_size, n_embd, scale)
            matrix(f"blk.{il}.attn_v.weight", n_head_kv * head_size, n_embd)
            matrix(f"blk.{il}.attn_output.weight", n_embd, n_head * head_size)
            if arch not in ("llama", "qwen2vl"):
                norm(f"blk.{il}.attn_q_norm.weight", head_size)
                norm(f"blk.{il}.attn_k_norm.weight", head_size)
        if arch == "gemma3":
            norm(f"blk.{il}.post_attention_norm.weight")
            norm(f"blk.{il}.post_ffw_norm.weight")
        norm(f"blk.{il}.ffn_norm.weight")
        matrix(f"blk.{il}.ffn_gate.weight", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_up.weight", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_down.weight", n_embd, n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Path(path)


def write_tiny_projector(path: str | os.PathLike[str], *, n_embd: int = 64, image_size: int = 32, seed: int = 0) -> Path:
    """Write the projector (mmproj) of a multimodal model with random weights, as LLaVA 1.5 has it, and return its path.

    It makes of an image ``(image_size / 8) ** 2`` embeddings for a model of ``n_embd`` channels.
    """
    patch, width, n_ff, n_layer = 8, 32, 48, 2
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(os.fspath(path), "clip")
    w.add_type("mmproj")
    w.add_name("tiny")
    w.add_string("clip.projector_type", "mlp")
    w.add_bool("clip.has_vision_encoder", True)
    for key, value in {"embedding_length": width, "feed_forward_length": n_ff, "block_count": n_layer,
                       "projection_dim": n_embd, "attention.head_count": 2, "image_size": image_size,
                       "patch_size": patch}.items():
        w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    w.add_array("clip.vision.image_mean", [0.5] * 3)
    w.add_array("clip.vision.image_std", [0.25] * 3)

    def tensor(name: str, *shape: int, factor: float = 1.0) -> None:
        w.add_tensor(name, factor * rng.standard_normal(shape, dtype=np.float32))

    def matrix(name: str, rows: int, columns: int) -> None:
        tensor(f"{name}.weight", rows, columns, factor=columns ** -0.5)
        tensor(f"{name}.bias", rows, factor=0.1)

    tensor("v.patch_embd.weight", width, 3, patch, patch, factor=0.1)
    tensor("v.position_embd.weight", (image_size // patch) ** 2, width)
    for il in range(n_layer):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            matrix(f"v.blk.{il}.{part}", width, width)
        matrix(f"v.blk.{il}.ffn_up", n_ff, width)
        matrix(f"v.blk.{il}.ffn_down", width, n_ff)
        for part in ("ln1", "ln2"):
            w.add_tensor(f"v.blk.{il}.{part}.weight", np.ones(width, np.float32))
            w.add_tensor(f"v.blk.{il}.{part}.bias", np.zeros(width, np.float32))
    matrix("mm.0", n_embd, width)
    matrix("mm.2", n_embd, n_embd)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Path(path)
