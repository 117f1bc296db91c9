"""Calibration: the tapped queries against a NumPy forward pass, the file it writes, what goes wrong."""

import hashlib
import signal
import subprocess
import time

import numpy as np
import pytest
from gguf import GGUFReader

from edgekv import calibrate as calibration
from edgekv import native
from edgekv.convert import save_filters
from edgekv.errors import EdgekvError
from edgekv.filters import read
from edgekv.gguf_file import GGUF
from edgekv.session import Session
from process import EDGEKV, edgekv, fails
from tinymodel import write_tiny_model

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_SIZE, EPS, BASE = 2, 4, 2, 32, 1e-5, 10000.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("calibrate") / "tiny.gguf", n_ctx=2048)


def post_rope_queries(path, tokens):
    """float64 [layer][token, head, channel]."""
    return forward(path, tokens)[0]


def forward(path, tokens):
    """Queries and keys after RoPE, float64 [layer][token, head, channel], and attention [layer][head, query, key]: a
    Llama forward pass, written from the architecture's definition."""
    w = {t.name: np.asarray(t.data, np.float64) for t in GGUFReader(path).tensors}

    def rms(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w[name]

    def rope(x):  # [token, head, channel], pairs of neighbouring channels turn together
        angles = np.arange(len(x))[:, None] * BASE ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None, :]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x, queries, keys, weights, n = w["token_embd.weight"][tokens], [], [], [], len(tokens)
    for il in range(N_LAYER):
        h = rms(x, f"blk.{il}.attn_norm.weight")
        q = rope((h @ w[f"blk.{il}.attn_q.weight"].T).reshape(n, N_HEAD, HEAD_SIZE))
        k = rope((h @ w[f"blk.{il}.attn_k.weight"].T).reshape(n, N_HEAD_KV, HEAD_SIZE))
        v = (h @ w[f"blk.{il}.attn_v.weight"].T).reshape(n, N_HEAD_KV, HEAD_SIZE)
        queries.append(q)
        keys.append(k)
        k, v = (np.repeat(a, N_HEAD // N_HEAD_KV, axis=1) for a in (k, v))
        s = np.einsum("qhc,khc->hqk", q, k) / np.sqrt(HEAD_SIZE)
        s = np.exp(np.where(np.tri(n, dtype=bool), s - s.max(-1, keepdims=True), -np.inf))
        weights.append(s / s.sum(-1, keepdims=True))
        attended = np.einsum("hqk,khc->qhc", weights[-1], v)
        x = x + attended.reshape(n, -1) @ w[f"blk.{il}.attn_output.weight"].T
        h = rms(x, f"blk.{il}.ffn_norm.weight")
        gate = h @ w[f"blk.{il}.ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blk.{il}.ffn_up.weight"].T)) @ w[f"blk.{il}.ffn_down.weight"].T
    return queries, keys, weights


@pytest.mark.parametrize("type_k", ["f32", "q8_0"])  # a quantised K is rotated behind the tap
def test_tapped_moments(model, type_k):
    tokens = np.random.default_rng(1).integers(3, 300, 133)
    with Session(model, n_ctx=256, n_ubatch=100, n_threads=1, type_k=type_k, type_v="f32", tap_queries=True) as session:
        session.read(tokens)
        expected = post_rope_queries(model, tokens)
        # keys in q8_0 disturb what the second layer sees
        tolerance = 1e-3 if type_k == "f32" else 3e-2
        for il in range(N_LAYER):
            for h in range(N_HEAD):
                q = expected[il][:, h]
                moment, total, n = native.tap(session.ctx, il, h, HEAD_SIZE)
                assert n == len(tokens)
                assert np.abs(moment - q.T @ q).max() < tolerance * np.abs(q.T @ q).max()
                assert np.abs(total - q.sum(0)).max() < tolerance * np.abs(q).sum(0).max()


def test_filters_of_a_model(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 80)  # 3,600 bytes, one token each
    first = calibration.calibrate(model, text_files=[text], n_threads=1)
    again = calibration.calibrate(model, text_files=[text], n_threads=1)
    assert first.flat().tobytes() == again.flat().tobytes()
    assert first.n_queries == first.n_tokens >= calibration.MIN_QUERIES
    assert first.text_sha256 == [hashlib.sha256(text.read_bytes()).hexdigest()]

    # the same sequences through NumPy: the direction of each KV head agrees
    with Session(model, n_ctx=2048, n_threads=1) as session:
        sequences = calibration.token_sequences(session, [text.read_text()], 2048, "")
    assert sum(map(len, sequences)) == first.n_tokens
    queries = [np.concatenate(layers) for layers in zip(*(post_rope_queries(model, s) for s in sequences))]
    for il in range(N_LAYER):
        directions, one_sided = [], []
        for h in range(N_HEAD):
            u = np.linalg.svd(queries[il][:, h], full_matrices=False)[2][0]
            directions.append(u * np.sign(u @ queries[il][:, h].mean(0)))
            projections = queries[il][:, h] @ directions[-1]
            one_sided.append(projections.mean() / np.sqrt((projections**2).mean()))
        expected = np.reshape(directions, (N_HEAD_KV, -1, HEAD_SIZE)).mean(1)
        cosine = (expected * first.vectors[il]).sum(-1) / np.linalg.norm(expected, axis=-1)
        assert (cosine / np.linalg.norm(first.vectors[il], axis=-1) > 0.999).all()
        one_sided = np.reshape(one_sided, (N_HEAD_KV, -1)).mean(axis=1)
        np.testing.assert_allclose(first.by_layer("one_sided")[il], one_sided, atol=2e-3)
    assert first.report.keys() == {"energy", "one_sided"}  # the text is too short for the correlations


def test_file_of_filters(model, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("All human beings are born free and equal in dignity and rights. " * 60)
    out = tmp_path / "filters.gguf"
    r = edgekv("calibrate", model, "--text", text, "-o", out, "-t", 1)
    assert r.exit_code == 0 and r.stdout == f"{out}\n"
    found = read(GGUF(out))
    assert found.layers == [0, 1] and found.head_size == [HEAD_SIZE] * 2

    with_filters = tmp_path / "with.gguf"
    assert edgekv("convert", model, "--with-qfilters", "--qfilters", out, "-o", with_filters).exit_code == 0
    assert read(GGUF(with_filters)).flat().tobytes() == found.flat().tobytes()

    full = tmp_path / "full.gguf"
    monkeypatch.setattr("os.fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(EdgekvError, match="full.gguf: the disk is full"):
        save_filters(full, GGUF(model), found)
    assert not list(tmp_path.glob("*full*"))


def test_bad_input(model, tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\x00")
    fails("tokens are too few to calibrate on", "calibrate", model, "--text", short)
    fails("binary.txt: is not UTF-8", "calibrate", model, "--text", binary)
    fails("--text nope.txt: no such file", "calibrate", model, "--text", "nope.txt")
    fails("is no folder that can be written to", "calibrate", model, "-o", tmp_path / "no" / "x.gguf")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:5000])
    fails("cut.gguf: truncated", "calibrate", tmp_path / "cut.gguf")


def test_default_text_is_english_and_long():
    text = calibration.default_text()
    assert len(text) > 200_000 and "statement" in text


@pytest.mark.parametrize("command", [["calibrate"], ["convert", "--with-qfilters"]])
def test_interrupted(smollm2, tmp_path, command):
    """Ctrl-C in the middle of the text: status 130, one line, and nothing is left."""
    out = tmp_path / "out.gguf"
    process = subprocess.Popen([*EDGEKV, command[0], str(smollm2), *command[1:], "-o", str(out)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    assert stderr.strip() == "edgekv: error: interrupted"
    assert list(tmp_path.iterdir()) == []
