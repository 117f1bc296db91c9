"""Headers of models that exist nowhere: for what a file says, without its gigabytes.

    python tests/header.py 8b.gguf      Llama-3.1-8B's shape, in the types of Q4_K_M
"""

import os
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


def write_header(path, *, arch="llama", n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, head=128, n_ff=14336,
                 n_vocab=128256, n_ctx=131072, tied=False, more=lambda w: None):
    """A model of Llama-3.1-8B's shape and the types of Q4_K_M, without data: the file has its length, but no blocks.
    ``n_head_kv``: of all layers, or a list."""
    w = gguf.GGUFWriter(os.fspath(path), arch)
    w.add_name("Llama-3.1-8B")
    w.add_block_count(n_layer)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_dimension_count(head)
    w.add_rope_freq_base(500000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(n_vocab)
    w.add_tokenizer_model("none")
    more(w)

    def add(name, *shape, kind=Type.Q4_K):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind == Type.F32:
            w.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            row = shape[-1] // block * size
            w.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), int(np.prod(shape[:-1])) * row, kind)

    add("token_embd.weight", n_vocab, n_embd)
    add("output_norm.weight", n_embd, kind=Type.F32)
    if not tied:
        add("output.weight", n_vocab, n_embd, kind=Type.Q6_K)
    for il in range(n_layer):
        # llama.cpp's use_more_bits()
        better = il < n_layer // 8 or il >= 7 * n_layer // 8 or (il - n_layer // 8) % 3 == 2
        better = Type.Q6_K if better else Type.Q4_K
        norms = {"attn_norm": n_embd, "ffn_norm": n_embd}
        if arch == "gemma3":
            norms |= {"attn_q_norm": head, "attn_k_norm": head, "post_attention_norm": n_embd, "post_ffw_norm": n_embd}
        for name, width in norms.items():
            add(f"blk.{il}.{name}.weight", width, kind=Type.F32)
        kv = (n_head_kv if isinstance(n_head_kv, int) else n_head_kv[il]) * head
        add(f"blk.{il}.attn_q.weight", n_head * head, n_embd)
        add(f"blk.{il}.attn_k.weight", kv, n_embd)
        add(f"blk.{il}.attn_v.weight", kv, n_embd, kind=better)
        add(f"blk.{il}.attn_output.weight", n_embd, n_head * head)
        add(f"blk.{il}.ffn_gate.weight", n_ff, n_embd)
        add(f"blk.{il}.ffn_up.weight", n_ff, n_embd)
        add(f"blk.{il}.ffn_down.weight", n_embd, n_ff, kind=better)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    sizes = [info.nbytes for infos in w.tensors for info in infos.values()]
    w.fout[0].truncate(-(-w.fout[0].tell() // 32) * 32 + sum(-(-size // 32) * 32 for size in sizes))
    w.close()
    return path


if __name__ == "__main__":
    write_header(sys.argv[1])
