"""What people see when something is wrong: one line, a status, and no half-written files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekv import cli, filters
from edgekv.cli.common import format_bytes
from edgekv.convert import convert
from edgekv.gguf_file import GGUF
from process import EDGEKV, edgekv, fails, python
from test_filters import random_filters
from tinymodel import write_tiny_model, write_tiny_projector

@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "tiny.gguf")


def test_help_lists_all_commands_and_imports_none():
    r = edgekv("--help")
    assert r.exit_code == 0 and all(name in r.stdout for name in cli.COMMANDS)
    code = ("import sys; from edgekv.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'numpy', 'llama_cpp', 'edgekv.cli.run', 'edgekv.native'} & set(sys.modules)")
    subprocess.run(python(code), check=True, stdout=subprocess.DEVNULL)


def test_version():
    r = edgekv("--version")
    assert r.exit_code == 0 and r.stdout.startswith("edgekv ")


def test_usage(model):
    fails("No such command 'frob'", "frob", status=2)
    fails("no MODEL", "inspect", status=2)
    fails("given twice", "inspect", model, "-m", model, status=2)
    fails("--frob", "inspect", model, "--frob", status=2)
    fails("nothing to do; add --with-qfilters, --outtype", "convert", model, status=2)
    fails("drop --text", "convert", model, "--with-qfilters", "--qfilters", "x", "--text", "y", status=2)
    assert edgekv().exit_code == 2


def test_model_is_positional_or_a_flag(model):
    assert edgekv("inspect", model).stdout == edgekv("inspect", "-m", model).stdout != ""


def test_bad_models(tmp_path, model):
    fails("nope.gguf: no such file", "inspect", tmp_path / "nope.gguf")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-5000])
    fails("cut.gguf: truncated GGUF file", "inspect", tmp_path / "cut.gguf")
    fails("cut.gguf: truncated GGUF file", "convert", tmp_path / "cut.gguf", "--with-qfilters", "--qfilters", model)
    (tmp_path / "text.gguf").write_text("hello")
    fails("text.gguf: not a GGUF file", "inspect", tmp_path / "text.gguf")


@pytest.mark.parametrize("command", [
    ("run", "-p", "x"), ("chat",), ("serve", "--port", "0"), ("plan",), ("plan", "--gpu", "rtx4060", "--ctx", "4096"),
    ("inspect",), ("inspect", "-o", "json"), ("bench",),
    ("convert", "--with-qfilters"), ("convert", "--outtype", "q8_0"), ("calibrate",),
    ("eval", "niah"), ("eval", "ppl"), ("filters", "export", "-o", "f.safetensors"), ("doctor",),
], ids=" ".join)
def test_a_projector_is_no_model(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    path = write_tiny_projector(tmp_path / "mmproj-tiny.gguf")
    where = ("-m", path) if command[0] == "doctor" else (path,)
    fails(f"{path}: is the projector of a multimodal model (mmproj), not a language model: name the model's own file",
          *command, *where)
    assert list(tmp_path.iterdir()) == [path]


def test_a_projector_that_is_fetched(tmp_path, monkeypatch):
    """It is worth having, with a line that says what for."""
    path = write_tiny_projector(tmp_path / "mmproj-tiny.gguf")
    monkeypatch.setattr("edgekv.pull.pull", lambda name: path)
    r = edgekv("pull", "hf:org/name/mmproj-tiny.gguf")
    assert (r.exit_code, r.stdout) == (0, f"{path}\n")
    assert r.stderr.splitlines()[1].startswith(f"edgekv: {path}: is the projector of a multimodal model (mmproj), not a ")
    assert "--mmproj" in r.stderr


@pytest.mark.parametrize("command", ("run", "chat"))
@pytest.mark.parametrize("flag", ("--mmproj", "--image", "--audio"))
def test_commands_that_read_texts(model, command, flag):
    r = fails(f" {command} reads texts; edgekv serve MODEL --mmproj FILE takes images and sound",
              command, model, flag, "x.png", status=2)
    assert r.stderr.startswith(f"edgekv: error: {flag}: ")


def test_windows(tmp_path, model, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("EDGEKV_LIB_PATH", str(tmp_path / "nowhere"))
    fails("edgekv does not run on Windows itself, install it in WSL", "run", model, "-p", "x")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_windows_before_a_compiler_is_looked_for():
    """As a script, CMakeLists.txt would end at project() otherwise."""
    r = subprocess.run(["cmake", "-DCMAKE_HOST_WIN32=1", "-P", Path(__file__).parents[1] / "CMakeLists.txt"],
                       capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.split("\n", 1)[1].strip() == (
        "edgekv does not build on Windows itself: run pip install . in WSL (Windows Subsystem for Linux)")


def test_inspect_json(model, tmp_path):
    facts = json.loads(edgekv("inspect", model, "-o", "json", "--kv-budget", "512").stdout)
    assert facts["qfilters"] is None and facts["architecture"] == "llama"
    assert facts["kv_bytes_per_token"] == {"f16": 2 * 2 * 2 * 32 * 2, "q8_0": 2 * 2 * 2 * 34, "q4_0": 2 * 2 * 2 * 18}
    assert facts["memory"]["cells"] == 4096 and facts["memory"]["budget_cells"] == 1024
    assert facts["memory"]["budget_kv_bytes"]["f16"] * 4 == facts["memory"]["kv_bytes"]["f16"] == 4096 * 512
    f = random_filters(GGUF(model))
    convert(model, model, f)
    got = json.loads(edgekv("inspect", model, "-o", "json").stdout)["qfilters"]
    assert (got["method"], got["layers"], got["head_size"]) == ("random", [0, 1], 32)
    assert got["model_sha256"] == f.model_sha256 and got["text_sha256"] == f.text_sha256
    assert "random" in edgekv("inspect", model).stdout
    fails("--kv-budget 0", "inspect", model, "--kv-budget", "0")
    fails("--kv-budget lots", "inspect", model, "--kv-budget", "lots")


def test_damaged_filters(model, tmp_path):
    f = random_filters(GGUF(model))
    convert(model, tmp_path / "f.gguf", f)
    data = (tmp_path / "f.gguf").read_bytes()
    for value, why in ((np.float32(np.nan), "NaN"), (np.zeros(32, np.float32), "all-zero")):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(data.replace(f.vectors[1][1].tobytes()[:value.nbytes], value.tobytes()))
        fails(f"bad.gguf: Q-Filters hold {'an ' if why[0] == 'a' else ''}{why}", "inspect", bad)
        fails("bad.gguf: Q-Filters", "convert", model, "--with-qfilters", "--qfilters", bad, "-o", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_convert_from_published_filters_and_from_a_gguf(model, tmp_path):
    published = np.random.default_rng(0).standard_normal((2, 2, 32)).astype(np.float32)
    save_file({"q_filters": published}, tmp_path / "f.safetensors")
    r = edgekv("convert", model, "--with-qfilters", "--qfilters", tmp_path / "f.safetensors")
    out = tmp_path / "tiny-qfilters.gguf"
    assert r.exit_code == 0 and r.stdout.splitlines()[-1] == str(out), r.output

    half = write_tiny_model(tmp_path / "half.gguf", dtype="f16")  # the same model in another precision
    r = edgekv("convert", half, "--with-qfilters", "--qfilters", out, "-o", tmp_path / "o.gguf")
    assert r.exit_code == 0 and r.stdout.splitlines()[-1] == str(tmp_path / "o.gguf")
    a, b = (filters.read(GGUF(p)).flat() for p in (out, tmp_path / "o.gguf"))
    assert a.tobytes() == b.tobytes()


def test_convert_refuses(model, tmp_path):
    def refuse(why, *args):
        before = sorted(tmp_path.rglob("*"))
        fails(why, "convert", model, "--with-qfilters", *args)
        assert sorted(tmp_path.rglob("*")) == before

    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    refuse("other.gguf: this GGUF holds no Q-Filters", "--qfilters", other)
    convert(other, other, random_filters(GGUF(other)))
    refuse("other.gguf: Q-Filters were made for another model", "--qfilters", other)
    wider = write_tiny_model(tmp_path / "wider.gguf", head_size=64)
    convert(wider, wider, random_filters(GGUF(wider)))
    refuse("wider.gguf: Q-Filters have shape [2, 64]", "--qfilters", wider)
    save_file({"q_filters": np.ones((3, 2, 32), np.float32)}, tmp_path / "f.safetensors")
    refuse("f.safetensors: q_filters has shape [3, 2, 32]", "--qfilters", tmp_path / "f.safetensors")
    refuse("--qfilters " + str(tmp_path / "nope"), "--qfilters", tmp_path / "nope")
    refuse("--qfilters", "--qfilters", tmp_path)
    refuse("--text " + str(tmp_path / "nope.txt"), "--text", tmp_path / "nope.txt")
    refuse("is no folder that can be written to", "-o", tmp_path / "no" / "o.gguf")
    refuse("is a folder", "-o", tmp_path)


def test_folders_of_hugging_face(tmp_path):
    fails("is a folder without config.json", "convert", tmp_path, "--with-qfilters")
    fails("which edgekv convert", "inspect", tmp_path)


def fake_calibration(monkeypatch, calibrate):
    module = types.ModuleType("edgekv.calibrate")
    module.calibrate = calibrate
    monkeypatch.setitem(sys.modules, "edgekv.calibrate", module)


def test_convert_calibrates(model, tmp_path, monkeypatch):
    calls = []

    def calibrate(path, **kwargs):
        calls.append((path, kwargs))
        return random_filters(GGUF(path))

    fake_calibration(monkeypatch, calibrate)
    text = tmp_path / "t.txt"
    text.write_text("words")
    assert edgekv("convert", model, "--with-qfilters", "--text", text, "-t", 2).exit_code == 0
    assert calls == [(model, {"text_files": (str(text),), "n_threads": 2, "progress": True})]
    assert filters.read(GGUF(tmp_path / "tiny-qfilters.gguf")) is not None


@pytest.mark.parametrize("error, status, why", [
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 1, "out of memory"),
    (OSError(28, "No space left on device", "/some/file"), 1, "/some/file: No space left on device"),
])
def test_what_a_command_may_raise(model, tmp_path, monkeypatch, error, status, why):
    def calibrate(*_, **__):
        raise error

    fake_calibration(monkeypatch, calibrate)
    r = edgekv("convert", model, "--with-qfilters")
    assert r.exit_code == status and r.stderr.strip().endswith(f"edgekv: error: {why}") and "Traceback" not in r.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
    monkeypatch.setenv("EDGEKV_DEBUG", "1")
    assert edgekv("convert", model, "--with-qfilters").exception is not None


def command_line(*args, **kwargs):
    env = {**os.environ, **kwargs.pop("env", {})}
    return subprocess.Popen([*EDGEKV, *map(str, args)], env=env, stderr=subprocess.PIPE, text=True,
                            **kwargs)


def test_ctrl_c_in_the_middle_of_a_conversion(model, tmp_path):
    """A real signal to a real process, once the temporary file is there."""
    convert(model, tmp_path / "f.gguf", random_filters(GGUF(model)))
    big = tmp_path / "big.gguf"
    big.write_bytes(model.read_bytes())
    os.truncate(big, 1 << 30)  # sparse: something to copy for a while
    out = tmp_path / "out"
    out.mkdir()
    p = command_line("convert", big, "--with-qfilters", "--qfilters", tmp_path / "f.gguf", "-o", out / "o.gguf",
                     stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(out.iterdir()) and p.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    p.send_signal(signal.SIGINT)
    stderr = p.communicate(timeout=30)[1]
    assert p.returncode == 130 and "edgekv: error: interrupted" in stderr and "Traceback" not in stderr, stderr
    assert list(out.iterdir()) == []


def test_a_reader_that_goes_away(model):
    read, write = os.pipe()
    os.close(read)
    p = command_line("inspect", model, stdout=write)
    os.close(write)
    assert p.communicate(timeout=30)[1] == "" and p.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_standard_output(model):
    with open("/dev/full", "w") as full:
        p = command_line("inspect", model, stdout=full)
        stderr = p.communicate(timeout=30)[1]
    assert p.returncode == 1 and stderr.splitlines()[0] == "edgekv: error: standard output: No space left on device"
    assert "Traceback" not in stderr


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 180 << 20, 5 << 30)] == [
        "0 B", "1023 B", "1.5 KiB", "180.0 MiB", "5.00 GiB"]
