"""Hugging Face checkpoints, converted by the pinned converter: a real model there and back, and what can be wrong."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv import published
from edgekv.filters import read
from edgekv.gguf_file import GGUF
from edgekv.llama import Llama
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from process import EDGEKV, python
from test_filters import REFERENCE

pytestmark = pytest.mark.slow

PROMPTS = ("What is the capital of France?", "What is 2 + 2?", "Translate to French: Good morning.",
           "How many days are in a week?", "Which ocean is the largest?", "Who painted the Mona Lisa?")
N_ANSWER = 40
EOS = 2


def edgekv(*args, cwd=None, command=EDGEKV, env={}):
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=500, cwd=cwd,
                          env={**os.environ, **env})


@pytest.fixture(scope="module")
def converted(smollm2_checkpoint, tmp_path_factory):
    """What one command makes of the checkpoint, in the working folder."""
    folder = tmp_path_factory.mktemp("converted")
    done = edgekv("convert", smollm2_checkpoint, "--outtype", "q8_0", "--with-qfilters", cwd=folder)
    assert done.returncode == 0, done.stderr
    path = folder / "SmolLM2-135M-Instruct-q8_0-qfilters.gguf"
    assert done.stdout.strip() == str(path) and os.listdir(folder) == [path.name]
    return path


def test_what_the_file_holds(converted, smollm2):
    """Its tokenizer is the original's, its weights are the original's up to Q8_0, its filters fit."""
    ours, theirs = gguf.GGUFReader(converted), gguf.GGUFReader(smollm2)
    for key in ("tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "pre", "model"):
        name = f"tokenizer.ggml.{key}"
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name
    assert ours.fields["tokenizer.chat_template"].contents() == theirs.fields["tokenizer.chat_template"].contents()
    weights = {t.name: t for t in ours.tensors}
    for t in theirs.tensors:
        old, new = (gguf.dequantize(x.data, x.tensor_type) for x in (t, weights[t.name]))
        assert np.linalg.norm(new - old) <= 0.01 * np.linalg.norm(old), t.name
    filters = read(GGUF(converted))
    filters.validate(GGUF(converted))
    assert filters.n_queries >= 3000 and filters.layers == list(range(30))


def test_same_token_ids(converted, smollm2):
    text = Path(__file__).read_text() + "\n  Größe, naïve, 東京, 12345 <|im_start|>user\n\t🙂"
    with Session(converted, n_ctx=64) as ours, Session(smollm2, n_ctx=64) as theirs:
        assert ours.tokenize(text) == theirs.tokenize(text)


def greedy(path, tokens, n, **kwargs) -> list[int]:
    """Tokens that a model goes on with."""
    with Session(path, n_ctx=512, n_ubatch=256, **kwargs) as session:
        logits, answer = session.decode(tokens, 0, logits="last")[0], []
        while len(answer) < n and (not answer or answer[-1] != EOS):
            answer.append(int(logits.argmax()))
            logits = session.decode(answer[-1:], len(tokens) + len(answer) - 1, logits="last")[0]
    return answer


def test_same_answers(converted, smollm2_checkpoint, smollm2, tmp_path):
    """In float32 the checkpoint's own, by transformers, token for token. In Q8_0, and against the file it all came from
    (which computes with activations of 8 bits, and is a small model): the same but where the checkpoint itself hardly
    prefers one token to the other."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = tmp_path / "f32.gguf"
    done = edgekv("convert", smollm2_checkpoint, "--outtype", "f32", "-o", exact)
    assert done.returncode == 0, done.stderr
    original = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32)
    same = {converted: 0, smollm2: 0}
    for prompt in PROMPTS:
        with Session(smollm2, n_ctx=64) as session:
            tokens = session.tokenize(chat_prompt(prompt))
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            theirs = original.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_ANSWER,
                                       do_sample=False)
            theirs = theirs[0, len(tokens):].tolist()
            logits = original(torch.tensor([tokens + theirs])).logits[0, len(tokens) - 1:]
        assert greedy(exact, tokens, N_ANSWER, type_k="f32", type_v="f32") == theirs
        for path in same:
            ours = greedy(path, tokens, N_ANSWER)
            if ours == theirs:
                same[path] += 1
                continue
            n = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            gap = float(logits[n, theirs[n]] - logits[n, ours[n]])
            print(f"{path.name}, {prompt!r}: parts at token {n} of {len(theirs)}, where the checkpoint prefers its own "
                  f"by {gap:.3f}")
            assert 0 <= gap <= 1
    print(f"of {len(PROMPTS)} answers in float32 all are the checkpoint's; in Q8_0 {same[converted]}; of the file it was "
          f"made from {same[smollm2]}")


def chat_prompt(prompt: str) -> str:
    """SmolLM2's chat template, written out."""
    return (f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


def test_torch_gives_the_same_filters(converted, smollm2_checkpoint, tmp_path):
    """Calibrated on the checkpoint and on the file: the same up to quantisation."""
    done = edgekv("convert", smollm2_checkpoint, "--outtype", "q8_0", "--with-qfilters", "--calibrate-with", "torch",
                  "-o", tmp_path / "torch.gguf")
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.concatenate(read(GGUF(path)).vectors).astype(np.float64)
                    for path in (converted, tmp_path / "torch.gguf"))
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    print(f"cosine of {len(cosines)} heads: median {np.median(cosines):.5f}, least {cosines.min():.5f}")
    assert np.median(cosines) >= 0.99


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference folder is not here")
def test_the_reference_filters(smollm2_checkpoint, smollm2, tmp_path):
    """Imported by the command as published; the kept sets agree as the reference folder's README says they do."""
    from safetensors.numpy import save_file

    reference = np.load(REFERENCE / "smollm2-135m.npz")
    tokens = json.loads((REFERENCE / "smollm2-135m.json").read_text())["tokens"][:1024]
    (tmp_path / "published").mkdir()
    save_file({"q_filters": reference["q_filters_kvpress"]}, tmp_path / "published" / "model.safetensors")
    out = tmp_path / "out.gguf"
    # f16: the reference computed with these very weights
    done = edgekv("convert", smollm2_checkpoint, "--outtype", "f16", "--with-qfilters", "--qfilters",
                  tmp_path / "published", "-o", out)
    assert done.returncode == 0, done.stderr

    ratios = {0.5: (0.996, 0.982), 0.75: (0.992, 0.977), 0.875: (0.988, 0.961), 0.96875: (0.982, 0.906)}
    for path, filters in ((out, read(GGUF(out))), (smollm2, published.load(str(tmp_path / "published"), GGUF(smollm2)))):
        with Session(path, n_ctx=1280, n_batch=1024, n_seq_max=len(ratios), filters=filters,
                     settings=EvictionSettings("qfilters", 32, 0, 0, "prompt")) as session:
            session.decode(tokens, 0)
            for seq_id in range(1, len(ratios)):
                session.copy(0, seq_id)
            for seq_id, (ratio, (mean, worst)) in enumerate(ratios.items()):
                kept = reference[f"kept_qfilter_{ratio}"]
                session.evict(seq_id, kept.shape[2])
                agreement = np.array([[len(np.intersect1d(session.positions(il, h, seq_id), kept[il, h])) / kept.shape[2]
                                       for h in range(kept.shape[1])] for il in range(kept.shape[0])])
                print(f"{path.name} @ {ratio}: kept sets agree to {agreement.mean():.4f} (README: {mean}), "
                      f"worst head {agreement.min():.4f} (README: {worst})")
                # other batches and CPU variants move single tokens
                assert agreement.mean() >= mean - 0.003 and agreement.min() >= worst - 0.035


def test_k_quants_in_one_command(smollm2_checkpoint, tmp_path):
    done = edgekv("convert", smollm2_checkpoint, "--outtype", "q4_k_m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "SmolLM2-135M-Instruct-q4_k_m.gguf"
    assert os.listdir(tmp_path) == [path.name] and "take a larger type" in done.stderr
    assert "Q4_K" in {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    llama = Llama(str(path), n_ctx=256, verbose=False)
    answer = llama.create_chat_completion([{"role": "user", "content": PROMPTS[0]}], temperature=0, max_tokens=20)
    print(answer["choices"][0]["message"]["content"])
    assert answer["usage"]["completion_tokens"] > 1


def test_from_the_hub(smollm2_checkpoint, smollm2, tmp_path):
    """Checkpoint and published filters by their names on a hub, which is on the loopback interface."""
    from hub_server import Hub
    from safetensors.numpy import save_file

    (tmp_path / "hub" / "org").mkdir(parents=True)
    (tmp_path / "hub" / "org" / "SmolLM2").symlink_to(smollm2_checkpoint)
    (tmp_path / "hub" / "org" / "SmolLM2_qfilt").mkdir()
    rows = np.random.default_rng(0).standard_normal((30, 3, 64), np.float32)
    save_file({"q_filters": rows}, tmp_path / "hub" / "org" / "SmolLM2_qfilt" / "model.safetensors")
    (tmp_path / "work").mkdir()
    with Hub(tmp_path / "hub") as server:
        done = edgekv("convert", "org/SmolLM2", "--outtype", "q4_0", "--with-qfilters", "--qfilters", "org/SmolLM2_qfilt",
                      cwd=tmp_path / "work", env={"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "",
                           "NO_PROXY": "127.0.0.1"})
    assert done.returncode == 0, done.stderr
    path = tmp_path / "work" / "SmolLM2-q4_0-qfilters.gguf"
    assert done.stdout.strip() == str(path) and os.listdir(path.parent) == [path.name]
    halves = np.stack(read(GGUF(path)).vectors).reshape(30, 3, 32, 2).swapaxes(2, 3).reshape(30, 3, 64)
    assert (halves == -rows).all() and GGUF(path).name == "SmolLM2"


# --- what can be wrong ----------------------------------------------------------------------------------------------


def broken(checkpoint: Path, folder: Path, **changes) -> Path:
    """A copy of the checkpoint (by links) with changed files: None removes one, a function gets the old text."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        change = changes.get(path.name.replace(".", "_"), ...)
        if change is ...:
            os.link(path, folder / path.name)
        elif change is not None:
            (folder / path.name).write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize("changes,said", [
    ({"config_json": None}, "is a folder without config.json"),
    ({"config_json": lambda text: b"{"}, "cannot take this checkpoint: "),
    ({"config_json": lambda text: text.replace(b"LlamaForCausalLM", b"NobodyKnowsForCausalLM")},
     "Model NobodyKnowsForCausalLM is not supported"),
    ({"model_safetensors": None}, "holds no weights"),
    ({"model_safetensors": lambda data: data[:1000]}, "cannot take this checkpoint: "),
    ({"model_safetensors": lambda data: b"x" * 1000}, "cannot take this checkpoint: "),
    ({"tokenizer_json": None}, "cannot take this checkpoint: "),
    ({"tokenizer_json": lambda text: text[: len(text) // 2]}, "cannot take this checkpoint: "),
], ids=["no config", "damaged config", "unknown architecture", "no weights", "truncated weights", "other weights",
        "no tokenizer", "damaged tokenizer"])
def test_bad_checkpoints(smollm2_checkpoint, tmp_path, changes, said):
    folder = broken(smollm2_checkpoint, tmp_path / "bad", **changes)
    (tmp_path / "out").mkdir()
    done = edgekv("convert", folder, "--outtype", "q8_0", cwd=tmp_path / "out")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "bad: " in done.stderr and said in done.stderr, done.stderr
    print(done.stderr)
    assert os.listdir(tmp_path / "out") == []


def test_without_torch(smollm2_checkpoint, tmp_path):
    command = python("sys.modules['torch'] = None\nfrom edgekv.cli import main; main()")
    done = edgekv("convert", smollm2_checkpoint, cwd=tmp_path, command=command)
    assert done.returncode == 1 and os.listdir(tmp_path) == []
    assert done.stderr.splitlines() == [f"edgekv: error: {smollm2_checkpoint}: converting a checkpoint needs torch and "
                                        "transformers and sentencepiece; pip install 'edgekv[convert]'"]


def test_full_disk(smollm2_checkpoint, tmp_path):
    """On a file system of 64 MiB, where neither the converter's output nor the quantiser's fits; needs to mount."""
    small = tmp_path / "small"
    small.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = edgekv("convert", smollm2_checkpoint, "--outtype", "f16", cwd=small)
        assert done.returncode == 1 and "the disk is full" in done.stderr and len(done.stderr.splitlines()) == 1
        assert os.listdir(small) == []
        whole = edgekv("convert", smollm2_checkpoint, "--outtype", "f16", "-o", tmp_path / "whole.gguf")
        assert whole.returncode == 0, whole.stderr
        done = edgekv("convert", tmp_path / "whole.gguf", "--outtype", "q8_0", "-o", small / "out.gguf")
        assert done.returncode == 1 and "disk full?" in done.stderr, done.stderr
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("after", [1.0, 4.0, 7.0])
def test_interrupted(smollm2_checkpoint, tmp_path, after):
    """Ctrl-C, in the converter's process or beside it, leaves nothing."""
    process = subprocess.Popen([*EDGEKV, "convert", str(smollm2_checkpoint), "--outtype", "q4_k_m", "--with-qfilters"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1] == "edgekv: error: interrupted" and "Traceback" not in err
    assert os.listdir(tmp_path) == []
