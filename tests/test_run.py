"""`edgekv run` and `edgekv.Llama`: answers, settings, errors."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from types import SimpleNamespace

import gguf as gguf_reader
import numpy as np
import pytest

import edgekv as package
from edgekv import native
from edgekv.cli.common import format_bytes
from edgekv.cli.options import auto_policy, warn_beyond_training
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.memory import available_bytes
from edgekv.session import Session
from edgekv.settings import DEFAULT_POLICY, EvictionSettings, RopeSettings, SelectionSettings, parse_budget
from process import EDGEKV, edgekv, fails, python
from test_filters import random_filters
from tinymodel import write_tiny_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("run") / "tiny.gguf", n_ctx=2048)


@pytest.fixture(scope="module")
def model(plain):
    path = plain.with_name("with-filters.gguf")
    convert(plain, path, random_filters(GGUF(plain)))
    return path


RUN = ["-n", 8, "--temp", 0, "-t", 1, "-ub", 64, "-b", 64]


def test_answer_and_figures(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    full = edgekv("run", model, "-f", text, "-p", "question", *RUN)
    assert full.exit_code == 0 and full.stdout.strip()
    assert "nothing is evicted" in full.stderr and "2,048 cells" in full.stderr

    bounded = edgekv("run", model, "-f", text, "-p", "question", "--kv-budget", 64, *RUN)
    assert bounded.exit_code == 0 and "of 256 cells used" in bounded.stderr
    assert "evictions" in bounded.stderr and " 0 evictions" not in bounded.stderr
    assert edgekv("run", model, "-p", "question", "--no-stats", "--kv-evict", "none", *RUN).stderr == ""


def test_auto_bounds_the_cache_by_free_memory(model, plain, monkeypatch):
    """K and V of the tiny model take 512 bytes a token: 2 layers, 2 KV heads, 32 channels, f16."""
    size, per_token = model.stat().st_size, 512
    # four fifths of what the model leaves free: 500 tokens behind a ubatch of 64
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: size + (500 + 64) * per_token * 5 // 4)
    r = edgekv("run", model, "-p", "question", *RUN)
    assert r.exit_code == 0 and "500 tokens are kept" in r.stderr and "of 768 cells used" in r.stderr

    # checkpoints want room too
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: size + (500 + 64) * per_token * 5 // 4 + (1 << 20))
    r = edgekv("run", model, "-p", "question", *RUN, "-c", 4096, "-cram", 1)
    assert r.exit_code == 0 and "500 tokens are kept" in r.stderr
    # a smaller batch makes the ubatch smaller, and leaves more for the cache
    assert "532 tokens are kept" in edgekv("run", model, "-p", "x", *RUN, "-c", 4096, "-cram", 1, "-b", 32).stderr

    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: 1000)
    fails("1000 B of free memory are not enough", "run", model, "-p", "x", *RUN)
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: None)
    assert "nothing is evicted" in edgekv("run", model, "-p", "question", *RUN).stderr


def test_free_memory_is_plausible():
    assert 2**20 < available_bytes() < 2**45


def test_standard_input(model):
    r = subprocess.run([*EDGEKV, "run", str(model), "-p", "-", *map(str, RUN)], input="from outside", capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip()


def test_selection_is_told_in_the_figures(model):
    r = edgekv("run", model, "-p", "word " * 100, "-c", "1024", "-n", "20", "--temp", "0", "-t", "1", "--kv-select", "quest",
               "--kv-select-budget", "32", "--kv-dense-layers", "1")
    assert r.exit_code == 0 and " of the pages, " in r.stderr, r.output
    without = edgekv("run", model, "-p", "word " * 100, "-c", "1024", "-n", "20", "--temp", "0", "-t", "1")
    assert without.exit_code == 0 and "pages" not in without.stderr, without.output


def test_selection_of_a_llama(model):
    for wrong, why in ((None, "selection=None: give"), (64, "selection=64: give"), ("h2o", "--kv-select h2o: unknown")):
        with pytest.raises(EdgekvError, match=why):
            package.Llama(model, n_ctx=256, selection=wrong)
    with pytest.raises(EdgekvError, match="drop flash_attn=False"):
        package.Llama(model, n_ctx=256, selection="quest", flash_attn=False)
    llama = package.Llama(model, n_ctx=256, n_threads=1, selection=SelectionSettings(budget=32, dense_layers=0))
    llama.eval([1] * 100)
    llama.eval([2])
    stats = llama.stats()
    assert stats.n_selections == 1 and 0 < stats.pages_read < stats.pages_total
    assert package.Llama(model, n_ctx=256, n_threads=1).selection.method == "none"


@pytest.mark.parametrize(("why", "arguments", "status"), [
    ("no prompt", [], 2),
    ("the prompt is empty", ["-p", " "], 1),
    ("-f nope.txt: No such file", ["-f", "nope.txt"], 1),
    ("'foo' is not one of", ["-p", "x", "--kv-evict", "foo"], 2),
    ("--kv-evict qfilters needs --kv-budget", ["-p", "x", "--kv-evict", "qfilters"], 1),
    ("--kv-budget 0: must leave at least 1 token", ["-p", "x", "--kv-budget", "0", "--kv-evict", "knorm"], 1),
    ("--kv-budget -3: must leave at least 1 token", ["-p", "x", "--kv-budget", "-3"], 1),
    ("--kv-budget many: give tokens", ["-p", "x", "--kv-budget", "many"], 1),
    ("--keep 20 and --kv-window 90 exceed --kv-budget 100",
     ["-p", "x", "--kv-budget", "100", "--kv-window", "90", "--keep", "20"], 1),
    ("--kv-window -1: must not be negative", ["-p", "x", "--kv-budget", "100", "--kv-window", "-1"], 1),
    ("--kv-evict none evicts nothing", ["-p", "x", "--kv-budget", "100", "--kv-evict", "none"], 1),
    ("-ctv q8_0: a quantised V needs flash attention", ["-p", "x", "-ctv", "q8_0", "-fa", "off"], 1),
    ("has no chat template, so -sys cannot be used", ["-p", "x", "-sys", "be brief"], 1),
    ("'foo' is not one of", ["-p", "x", "--kv-select", "foo"], 2),
    ("--kv-select-budget 20: must be two pages at least, 32 tokens",
     ["-p", "x", "--kv-select", "quest", "--kv-select-budget", "20"], 1),
    ("--kv-select-budget many: give a number of tokens, or auto",
     ["-p", "x", "--kv-select", "quest", "--kv-select-budget", "many"], 1),
    ("--kv-select-budget is for selection: add --kv-select quest", ["-p", "x", "--kv-select-budget", "64"], 1),
    ("--kv-select quest needs flash attention: drop -fa off", ["-p", "x", "--kv-select", "quest", "-fa", "off"], 1),
    ("--kv-grouped-attn needs flash attention: drop -fa off", ["-p", "x", "--kv-grouped-attn", "-fa", "off"], 1),
    ("'12' is not one of", ["-p", "x", "--kv-select", "quest", "--kv-page-size", "12"], 2),
    ("--rope-scale 0.0: must be a number above 0", ["-p", "x", "--rope-scale", "0"], 1),
    ("--rope-freq-base inf: must be a number above 0", ["-p", "x", "--rope-freq-base", "inf"], 1),
    ("--yarn-orig-ctx needs --rope-scaling yarn", ["-p", "x", "--rope-scaling", "linear", "--yarn-orig-ctx", "64"], 1),
    ("--yarn-orig-ctx -1: must be a number above 0", ["-p", "x", "--yarn-orig-ctx", "-1"], 1),
    ("--yarn-beta-slow nan: must be a number, 0 or above", ["-p", "x", "--yarn-beta-slow", "nan"], 1),
    ("--rope-scale and --rope-freq-scale say the same", ["-p", "x", "--rope-scale", "2", "--rope-freq-scale", "0.5"], 1),
    ("--rope-scaling none stretches nothing", ["-p", "x", "--rope-scaling", "none", "--rope-scale", "2"], 1),
    ("--yarn-ext-factor needs --rope-scaling yarn", ["-p", "x", "--yarn-ext-factor", "0"], 1),
    ("'ntk' is not one of", ["-p", "x", "--rope-scaling", "ntk"], 2),
    ("exceed context window of 256", ["-p", "word " * 100, "-c", "200"], 1),
])
def test_bad_input(model, why, arguments, status):
    r = edgekv("run", model, *arguments)
    assert r.exit_code == status and r.stdout == "", r.output
    last = r.stderr.strip().splitlines()[-1]
    assert last.startswith("edgekv: error: ") and why in last and "Traceback" not in r.output


def test_model_without_filters(plain, tmp_path, monkeypatch):
    """They are calibrated once, into the user's cache folder; the library leaves that to its caller."""
    monkeypatch.setenv("EDGEKV_CACHE", str(tmp_path))
    monkeypatch.setattr("edgekv.calibrate.calibrate", lambda path, **_: random_filters(GGUF(path)))
    with pytest.raises(EdgekvError, match="has no Q-Filters: run `edgekv convert"):
        package.Llama(plain, kv_evict="qfilters", kv_budget=64)
    arguments = ["run", plain, "-p", "x", "--kv-evict", "qfilters", "--kv-budget", 64, *RUN]
    first = edgekv(*arguments)
    (kept,) = (tmp_path / "filters").iterdir()
    assert first.exit_code == 0 and "calibrating them once" in first.stderr
    written = kept.stat().st_mtime_ns
    assert "calibrating" not in edgekv(*arguments).stderr and kept.stat().st_mtime_ns == written
    kept.write_bytes(b"damaged")
    assert "calibrating" in edgekv(*arguments).stderr and "calibrating" not in edgekv(*arguments).stderr
    assert edgekv("run", plain, "-p", "x", "--kv-evict", "keydiff", "--kv-budget", 64, *RUN).exit_code == 0


@pytest.mark.parametrize("spoil", ["nan", "zero", "model"])
def test_spoilt_filters(plain, tmp_path, spoil):
    """Filters that convert would refuse, written into the file all the same."""
    gguf = GGUF(plain)
    filters = random_filters(gguf)
    if spoil == "model":
        filters.model_sha256 = "0" * 64
    else:
        filters.vectors[1][0] = np.nan if spoil == "nan" else 0.0
    path = tmp_path / "spoilt.gguf"
    type(filters).validate, validate = (lambda *_a, **_k: None), type(filters).validate
    try:
        convert(plain, path, filters)
    finally:
        type(filters).validate = validate
    why = {"nan": "NaN", "zero": "all-zero", "model": "another model"}[spoil]
    fails(why, "run", path, "-p", "x", "--kv-evict", "qfilters", "--kv-budget", 64)


def test_context_beyond_training(model):
    told = "-c 5000 is beyond the 2,048 tokens the model was trained on"
    r = edgekv("run", model, "-p", "question", "-c", 5000, *RUN)
    assert r.exit_code == 0 and told in r.stderr and "--rope-scaling yarn --rope-scale 3" in r.stderr
    scaled = ("--rope-scaling", "yarn", "--rope-scale")
    assert "stretched to 4,096" in edgekv("run", model, "-p", "question", "-c", 5000, *RUN, *scaled, 2).stderr
    assert "beyond" not in edgekv("run", model, "-p", "question", "-c", 5000, *RUN, *scaled, 3).stderr
    assert "beyond" not in edgekv("run", model, "-p", "question", *RUN).stderr


@pytest.mark.parametrize(("header", "rope", "n_ctx", "told"), [
    # a header that stretches 4,096 tokens 8 times says 32,768; a scale given comes in the place of the 8
    (8.0, {}, 32768, ""), (8.0, {}, 40000, "--rope-scale 10 "), (8.0, {"rope_scale": 2.0}, 32768, "stretched to 8,192"),
    (8.0, {"rope_scale": 10.0}, 40000, ""), (None, {"rope_scale": 2.0}, 65536, ""),
    (None, {"rope_freq_scale": 0.5}, 65537, "--rope-scale 3 "),
    (8.0, {"rope_scaling": "yarn", "rope_scale": 4.0, "yarn_orig_ctx": 10000}, 40000, ""),
])
def test_how_far_a_model_reaches(header, rope, n_ctx, told):
    gguf = SimpleNamespace(context_length=32768, rope_factor=1.0 if header is None else header)
    lines = []
    warn_beyond_training(n_ctx, gguf, RopeSettings.resolve(**rope), tell=lines.append)
    assert len(lines) == bool(told) and (not told or told in lines[0])


@pytest.mark.parametrize(("key", "value", "factor"), [
    ("rope.scaling.factor", 8.0, 8), ("rope.scale_linear", 4.0, 4), ("rope.scaling.factor", 0.0, 1), ("x", 2.0, 1)])
def test_factor_of_the_header(plain, tmp_path, key, value, factor):
    out = tmp_path / "scaled.gguf"
    reader = gguf_reader.GGUFReader(plain)
    writer = gguf_reader.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "general.name")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_float32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUF(out, header_only=True).rope_factor == factor


@pytest.mark.parametrize(("ours", "theirs"), [
    ({"rope_scale": 2.0}, {"rope_freq_scale": 0.5}),
    ({"rope_scaling": "linear", "rope_freq_scale": 0.25}, {"rope_scaling_type": 1, "rope_freq_scale": 0.25}),
    ({"rope_freq_base": 500.0}, {"rope_freq_base": 500.0}),
    ({"rope_scaling": "yarn", "rope_scale": 4.0, "yarn_orig_ctx": 64, "yarn_ext_factor": 0.5, "yarn_attn_factor": 1.5,
      "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
     {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_orig_ctx": 64, "yarn_ext_factor": 0.5,
      "yarn_attn_factor": 1.5, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}),
])
def test_rope_scaling(plain, ours, theirs):
    """Against the bindings, whose parameters are named one by one."""
    from llama_cpp import Llama as Stock

    tokens = [3 + 7 * i % 250 for i in range(40)]

    def stock(**options):
        llama = Stock(str(plain), n_ctx=256, n_threads=1, verbose=False, logits_all=True, **options)
        llama.eval(tokens)
        return llama.scores[:40].copy()

    with Session(plain, n_ctx=256, n_threads=1, rope=RopeSettings.resolve(**ours)) as session:
        got = session.decode(tokens, 0, logits="all")
    assert np.array_equal(got, stock(**theirs)) and not np.allclose(got, stock(), atol=1e-2)


def test_one_prompt_needs_the_windows_alone(tmp_path, monkeypatch):
    """Nobody goes back behind an answer of `edgekv run`, so layers with sliding windows hold no more than those."""
    from llama_cpp import Llama as Stock

    path = write_tiny_model(tmp_path / "tiny.gguf", arch="gemma3", n_layer=4, n_ctx=4096, n_swa=32)
    cell, windows = 2 * 2 * 32 * 2, len(native.swa_layers(path))
    assert 0 < windows < 4
    need = cell * ((4 - windows) * 4096 + windows * 256)
    prompt = "word " * 60
    r = edgekv("run", path, "-p", prompt, "-no-cnv", "--kv-evict", "none", *RUN)
    assert r.exit_code == 0 and f"KV cache {format_bytes(need)}," in r.stderr
    stock = Stock(str(path), n_ctx=4096, n_batch=64, n_ubatch=64, n_threads=1, swa_full=True, verbose=False)
    answer = stock.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
    assert ascii_part(r.stdout).strip() == ascii_part(answer).strip()

    # what auto counts, to the cell that it rounds up by
    told = []
    for room, swa_full, policy in ((need + 255 * windows * cell, False, "none"), (need // 2, False, "some"),
                                   (need + 255 * windows * cell, True, "streaming"), (need // 2, True, "some"),
                                   (4 * 4096 * cell, True, "none")):
        monkeypatch.setattr("edgekv.memory.available_bytes", lambda: path.stat().st_size + -(-room * 5 // 4))
        found, budget = auto_policy(GGUF(path), None, 4096, "f16", "f16", 64, SelectionSettings("none"), [], 0,
                               swa_full=swa_full, tell=told.append)
        assert found == {"some": DEFAULT_POLICY}.get(policy, policy), (room, swa_full, told)
        assert found != "streaming" or budget == "4096"  # where a cache that is gone back in keeps windows alone


def on_a_terminal(*args):
    """A process whose standard error is a terminal, and the terminal's other end."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 120)) if hasattr(termios, "tcsetwinsize") else None
    process = subprocess.Popen([*EDGEKV, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=there,
                               text=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(there)
    return process, here


def all_that_comes(fd, until, seconds=120):
    """What a terminal shows until it matches, or its program ends; without colours and cursor movements."""
    text, shown, deadline = "", b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not select.select([fd], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(fd, 65536)
        except OSError:  # the other end is closed
            part = b""
        shown += part
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
        if not part or (until and re.search(until, text)):
            return text
    raise AssertionError(text)


def test_a_long_prompt_on_a_terminal(model, tmp_path):
    """A bar with tokens and the time left while it is read; Ctrl-C ends it at once, in the middle."""
    text = tmp_path / "text.txt"
    text.write_text("word " * 60000)
    process, terminal = on_a_terminal("run", model, "-f", text, "-p", "question", "-c", 450000, "--kv-evict", "streaming",
                                      "--kv-budget", 256, *RUN)
    try:
        shown = all_that_comes(terminal, r"reading .*?\d+%\s+[\d,]+ of [\d,]+ tokens\s+\d+:\d\d:\d\d")
        done, total = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) tokens", shown)[-1])
        assert 0 < done < total and total > 50000
        process.send_signal(signal.SIGINT)
        rest = all_that_comes(terminal, None)
        assert process.wait(30) == 130 and process.stdout.read() == ""
        assert rest.strip().splitlines()[-1] == "edgekv: error: interrupted" and "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(terminal)


def test_help_all_shows_the_rarer_options():
    assert "--kv-window" not in edgekv("run", "--help").stdout
    r = edgekv("run", "--help-all")
    assert r.exit_code == 0 and "--kv-window" in r.stdout and "--top-k" in r.stdout


# --- edgekv.Llama ------------------------------------------------------------------------------------------------


def ascii_part(text):
    return text.encode("ascii", "ignore")


def test_llama(model, capfd):
    llama = package.Llama(model, n_ctx=1024, n_batch=64, n_ubatch=64, n_threads=1, kv_evict="qfilters", kv_budget=64)
    assert llama.n_ctx() == 1024 and llama.stats().cells_allocated == 256

    prompt = [3 + i % 250 for i in range(300)]
    out = llama.create_completion(prompt, max_tokens=20, temperature=0)
    assert out["usage"]["prompt_tokens"] == 300
    stats = llama.stats()
    assert stats.n_evictions > 0 and stats.cells_used <= 128 and stats.tokens_seen >= 300
    assert list(llama.kept_positions(0, 0)[:4]) == [0, 1, 2, 3]

    # the same prompt again: its tail is gone from the cache, so it is read anew, with the same result
    again = llama.create_completion(prompt, max_tokens=20, temperature=0)
    assert again["choices"][0]["text"] == out["choices"][0]["text"]
    llama.reset()
    pieces = llama.create_completion(prompt, max_tokens=20, temperature=0, stream=True)
    # a stream leaves out a character whose last bytes have not come
    streamed = "".join(p["choices"][0]["text"] for p in pieces)
    assert ascii_part(streamed) == ascii_part(out["choices"][0]["text"])

    with pytest.raises(EdgekvError, match="pickled"):
        llama.__getstate__()
    with pytest.raises(EdgekvError, match="exceed the budget"):
        llama.set_keep(60)
    with pytest.raises(ValueError, match="exceed context window"):
        llama.create_completion([5] * 1100, max_tokens=1)
    assert capfd.readouterr().err == ""


def test_llama_off_is_the_bindings_own(model):
    from llama_cpp import Llama as Stock

    options = dict(n_ctx=256, n_threads=1, verbose=False)
    prompt = [3 + i % 250 for i in range(100)]
    texts = [cls(str(model), **options).create_completion(prompt, max_tokens=20, temperature=0)["choices"][0]["text"]
             for cls in (package.Llama, Stock)]
    assert texts[0] == texts[1]


def test_prompt_mode(model):
    llama = package.Llama(model, n_ctx=512, n_threads=1, kv_evict="knorm", kv_budget=64, kv_evict_mode="prompt")
    llama.eval([3 + i % 250 for i in range(200)])
    assert llama.stats().cells_allocated == 512 and llama.stats().cells_used == 200
    assert llama.evict() == 136 and llama.evict() == 0 and llama.stats().cells_used == 64
    assert llama.evict(32) == 32


def test_system_prompt_tokens(smollm2):
    llama = package.Llama(smollm2, n_ctx=256, n_threads=2)
    messages = [{"role": "system", "content": "You are a lighthouse keeper."}]
    n = llama.system_tokens(messages)
    shared = llama.detokenize(llama.chat_tokens([*messages, {"role": "user", "content": "hi"}])[:n], special=True)
    assert b"lighthouse keeper" in shared and b"hi" not in shared


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "tokens"), [
    (2048, 2048), ("2048", 2048), ("x8", 1024), ("X2.5", 3276), ("1MiB", 1024), ("1.5 kB", 1), ("2048B", 2),
])
def test_budgets(text, tokens):
    assert parse_budget(text, n_ctx=8192, bytes_per_token=1024) == tokens


@pytest.mark.parametrize("text", ["", "x", "x0", "x0.5", "1.5", "GiB", "1 GB GB", "0x10", "1e9", "9" * 400 + "B", "½"])
def test_bad_budgets(text):
    with pytest.raises(EdgekvError, match="--kv-budget"):
        parse_budget(text, n_ctx=8192, bytes_per_token=1024)


def test_defaults_give_way_to_a_small_budget():
    for budget in range(1, 40):
        s = EvictionSettings.resolve("knorm", budget, n_ctx=100)
        assert s.keep + s.window <= s.budget == budget
    assert EvictionSettings.resolve("knorm", 2048, n_ctx=100).window == 256


def test_llama_cpp_imported_before(tmp_path):
    """Another library under the bindings is an error that says what to do."""
    code = ("import os, sys, types\nfake = types.ModuleType('llama_cpp.llama_cpp'); fake._base_path = '/elsewhere'\n"
            "sys.modules['llama_cpp.llama_cpp'] = fake\nimport edgekv")
    r = subprocess.run(python(code), capture_output=True, text=True)
    assert r.returncode != 0 and "import edgekv first" in r.stderr.splitlines()[-1]
