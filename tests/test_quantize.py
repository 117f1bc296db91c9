"""Smaller weights for a GGUF file, and the process that makes them."""

import os
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest

from edgekv import child
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.filters import model_fingerprint, read
from edgekv.gguf_file import GGUF
from edgekv.quantize import quantize
from process import EDGEKV
from test_filters import random_filters
from tinymodel import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # rows of 256, so that k-quants fit
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_embd=256, head_size=64, n_ff=512)


@pytest.mark.parametrize("outtype,block,error", [("f16", "F16", 1e-3), ("q8_0", "Q8_0", 0.01), ("q4_k_m", "Q4_K", 0.1),
                                                 ("q4_0", "Q4_0", 0.12)])
def test_weights(model, tmp_path, outtype, block, error):
    """What is stored is the model, as independent code reads it, and its metadata and norms are untouched."""
    annotated, out = tmp_path / "annotated.gguf", tmp_path / "out.gguf"
    convert(model, annotated, random_filters(GGUF(model)))
    quantize(annotated, out, outtype)

    before, after = gguf.GGUFReader(model), gguf.GGUFReader(out)
    seen = {t.name: t for t in after.tensors}
    assert [t.name for t in before.tensors] and seen.keys() == {t.name for t in before.tensors}
    for t in before.tensors:
        stored = gguf.dequantize(seen[t.name].data, seen[t.name].tensor_type)
        if "norm" in t.name:
            assert (stored == t.data).all()
        assert np.linalg.norm(stored - t.data) <= error * np.linalg.norm(t.data)
    assert block in {t.tensor_type.name for t in after.tensors}
    assert model_fingerprint(GGUF(out)) == model_fingerprint(GGUF(model))
    kept = read(GGUF(out))
    kept.validate(GGUF(out))
    assert (kept.flat() == read(GGUF(annotated)).flat()).all()


def test_rows_that_do_not_fit(tmp_path):
    said = []
    quantize(write_tiny_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf", "q4_k_m", say=said.append)
    assert len(said) == 1 and "cannot be q4_k_m" in said[0]


def edgekv(*args, cwd=None):
    return subprocess.run([*EDGEKV, *map(str, args)], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_command(model, tmp_path):
    """One command quantises and annotates; what it leaves is one file."""
    source = tmp_path / "filters.gguf"
    convert(model, source, random_filters(GGUF(model)))
    done = edgekv("convert", model, "--outtype", "Q4_K_M", "--with-qfilters", "--qfilters", source, "-o",
                  tmp_path / "out.gguf")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["filters.gguf", "out.gguf"]
    assert (read(GGUF(tmp_path / "out.gguf")).flat() == read(GGUF(source)).flat()).all()

    again = edgekv("convert", tmp_path / "out.gguf", "--outtype", "q8_0")
    assert again.returncode == 1 and "is quantised already" in again.stderr and len(again.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["filters.gguf", "out.gguf"]


def test_replaces_filters_only_with_force(model, tmp_path):
    first, second = random_filters(GGUF(model), seed=1), random_filters(GGUF(model), seed=2)
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    convert(model, target, first)
    convert(model, source, second)
    command = ("convert", target, "--with-qfilters", "--qfilters", source, "-o", target)
    refused = edgekv(*command)
    assert refused.returncode == 1 and "--force replaces them" in refused.stderr
    assert (read(GGUF(target)).flat() == first.flat()).all()
    done = edgekv(*command, "--force")
    assert done.returncode == 0, done.stderr
    assert (read(GGUF(target)).flat() == second.flat()).all()


@pytest.mark.parametrize("args,said", [
    ((), "nothing to do"),
    (("--outtype", "auto"), "is for checkpoints"),
    (("--outtype", "q9_9"), "'q9_9' is not one of"),
    (("--with-qfilters", "--calibrate-with", "torch"), "needs a checkpoint"),
    (("--with-qfilters", "--device", "cpu"), "--device is for"),
    (("--with-qfilters", "--qfilters", "x", "--text", "y"), "drop --text"),
    (("--qfilters", "x"), "add it"),
    (("--force", "--outtype", "f16"), "add it"),
    (("--outtype", "f16", "-o", "none/out.gguf"), "no folder that can be written to"),
])
def test_wrong_usage(model, tmp_path, args, said):
    done = edgekv("convert", model, *args, cwd=tmp_path)
    assert done.returncode in (1, 2) and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_target_that_cannot_be_written(model):
    with pytest.raises(EdgekvError, match="^/dev/full: cannot be written"):
        quantize(model, "/dev/full", "q8_0")


# --- processes ------------------------------------------------------------------------------------------------------


def test_child_lines():
    lines = []
    code = "import sys; print('one'); print(' 5%\\r10%', file=sys.stderr); print('ü', end=''); sys.exit(3)"
    assert child.run([sys.executable, "-u", "-c", code], lines.append) == 3
    assert lines == ["one", " 5%", "10%", "ü"]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_child_dies_with_an_interrupt():
    """With what it has started itself."""
    code = ("import subprocess, sys, time, os\n"
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
            "print(os.getpid(), p.pid, flush=True); time.sleep(100)")
    pids = []

    def each(line):
        pids.extend(map(int, line.split()))
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.run([sys.executable, "-c", code], each)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2 and not any(map(alive, pids))
