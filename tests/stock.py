"""Runs the unpatched library, in a process of its own: ``python stock.py TASK.json``. It never imports edgekv.

LLAMA_CPP_LIB_PATH names the library. A task says which model and context, and lists steps:

    {"decode": [tokens], "pos": 0}      logits of all of them are appended
    {"greedy": 64}                      64 tokens of its own choice, one by one, logits of each appended
    {"save": "FILE"}                    the state of sequence 0
    {"load": "FILE"}

The logits are written to ``logits`` as float32 [n, n_vocab], the greedy tokens printed as JSON.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np


def load_backends(folder: Path) -> None:
    """Run-time variants of the CPU backend are not beside the Python executable, where they are looked for."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    ggml = ctypes.CDLL(str(folder / f"{'' if sys.platform == 'win32' else 'lib'}ggml{suffix}"))
    ggml.ggml_backend_load_all_from_path(str(folder).encode())


def main(task: dict) -> None:
    load_backends(Path(os.environ["LLAMA_CPP_LIB_PATH"]))
    import llama_cpp

    if hasattr(llama_cpp.llama_cpp._lib, "llama_edgekv_set_next"):
        sys.exit("this library is patched")
    model = llama_cpp.llama_model_load_from_file(os.fsencode(task["model"]), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    for name, value in task["context"].items():
        setattr(params, name, value)
    ctx = llama_cpp.llama_init_from_model(model, params)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    logits, chosen = [], []

    def decode(tokens, pos: int) -> None:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos + i, 1, True
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(ctx, batch) != 0:
            sys.exit("llama_decode failed")
        raw = llama_cpp.llama_get_logits(ctx)
        logits.append(np.ctypeslib.as_array(raw, shape=(len(tokens), n_vocab)).copy())

    pos = 0
    for step in task["steps"]:
        if "decode" in step:
            pos = step.get("pos", pos)
            decode(step["decode"], pos)
            pos += len(step["decode"])
        elif "greedy" in step:
            for _ in range(step["greedy"]):
                chosen.append(int(logits[-1][-1].argmax()))
                decode(chosen[-1:], pos)
                pos += 1
        elif "save" in step:
            size = llama_cpp.llama_state_seq_get_size(ctx, 0)
            blob = (ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_seq_get_data(ctx, blob, size, 0) != size:
                sys.exit("the state cannot be saved")
            Path(step["save"]).write_bytes(bytes(blob))
        elif "load" in step:
            data = Path(step["load"]).read_bytes()
            blob = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            if llama_cpp.llama_state_seq_set_data(ctx, blob, len(data), 0) != len(data):
                sys.exit("the state cannot be loaded")
    np.save(task["logits"], np.concatenate(logits))
    print(json.dumps(chosen))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
