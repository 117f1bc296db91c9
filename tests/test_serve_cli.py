"""``edgekv serve``: what it starts, what it says, and that nothing is left behind. Most of it with a program in the
place of llama-server that writes down what it gets; the real one at the end."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from edgekv import server
from edgekv.cli import options
from edgekv.cli.talk import say
from edgekv.convert import convert
from edgekv.filters import model_fingerprint, read
from edgekv.gguf_file import GGUF
from process import edgekv, fails, python
from test_filters import random_filters
from tinymodel import write_tiny_model, write_tiny_projector

FAKE = f"""#!{sys.executable} -S
import json, os, signal, socket, sys, time
here = os.environ["FAKE"]
mode, status = os.environ.get("FAKE_MODE", "answer"), int(os.environ.get("FAKE_STATUS", "0"))
argv = sys.argv[1:]
signal.alarm(60)  # whatever a test does wrong

def value(flag):
    return argv[argv.index(flag) + 1] if flag in argv else None

def note(name, text):
    with open(os.path.join(here, name), "a") as file:
        file.write(text)

def on_signal(number, _frame):
    note("signals", signal.Signals(number).name + "\\n")
    if mode != "deaf":
        os._exit(status)

filters = value("--kv-filters")
note("started", json.dumps({{
    "argv": argv, "env": dict(os.environ), "pid": os.getpid(), "session": os.getsid(0), "stdin": sys.stdin.read(),
    "filters": list(open(filters, "rb").read()) if filters else None}}) + "\\n")
if "--help" in argv or "--version" in argv:
    print("usage of llama-server")
    sys.exit()
print(os.environ.get("FAKE_LOG", ""), file=sys.stderr, flush=True)
if mode == "fail":
    sys.exit(status)
if mode == "abort":
    os.abort()
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "load":  # dies of signals meanwhile, as the real one
    time.sleep(60)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)

health = f"GET {{value('--api-prefix') or ''}}/health HTTP/1.1".encode()
listener = socket.create_server((value("--host"), int(value("--port"))))
n = 0
while True:
    client = listener.accept()[0]
    n += 1
    up = n > 1 and client.recv(1000).startswith(health)  # it loads at first
    ready = 401 if value("--api-prefix") and value("--api-key") else 200  # as the real one
    client.sendall(b"HTTP/1.1 %d x\\r\\nContent-Length: 0\\r\\n\\r\\n" % (ready if up else 503))
    client.close()
    if up:
        note("up", "")
        while mode in ("answer", "die"):
            time.sleep(0.01)
            if os.path.exists(os.path.join(here, "told")):
                print(os.environ.get("FAKE_LATER", ""), file=sys.stderr, flush=True)
                os.abort() if mode == "die" else os._exit(status)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny.gguf")


class Fake:
    """The program, and what it wrote down."""

    def __init__(self, folder: Path):
        self.folder, self.program = folder, folder / "llama-server"
        self.program.write_text(FAKE)
        self.program.chmod(stat.S_IRWXU)

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def started(self) -> dict:
        return json.loads(self.read("started")[-1])

    def value(self, flag: str) -> str | None:
        argv = self.started["argv"]
        assert argv.count(flag) <= 1, argv
        return argv[argv.index(flag) + 1] if flag in argv else None


@pytest.fixture
def fake(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("LLAMA_ARG_", "LLAMA_API_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("EDGEKV_CACHE", str(tmp_path / "cache"))
    fake = Fake(tmp_path)
    monkeypatch.setattr("edgekv.server.program", lambda: fake.program)
    monkeypatch.setattr("edgekv.server.POLL_S", 0.01)

    def told(line):
        say(line)
        if "is served at" in line:  # the program may end now
            (tmp_path / "told").touch()

    monkeypatch.setattr("edgekv.cli.serve.say", told)
    return fake


def serve(*args, status=0):
    """In this process, until the program ends by itself."""
    (Path(os.environ["FAKE"]) / "told").unlink(missing_ok=True)
    r = edgekv("serve", *args, *([] if "--port" in args else ["--port", 0]))
    assert r.exit_code == status and r.stdout.strip() == "" and "Traceback" not in r.stderr, (
        r.stdout, r.stderr, r.exception)
    return r


# --- what llama-server gets ------------------------------------------------------------------------------------------


def test_defaults(model, fake, monkeypatch):
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: 4000 << 20)
    r = serve(model)
    port = fake.value("--port")
    assert fake.started["argv"] == [
        "-m", str(model), "-c", str(4 * 4096), "-np", "4", "-b", "512", "-ub", "512",
        "-t", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()), "-ngl", "0",
        "-ctk", "f16", "-ctv", "f16", "-fa", "auto", "-cram", "1000", "--host", "127.0.0.1", "--port", port,
        "-fit", "off", "--no-cache-idle-slots", "--metrics", "--alias", "tiny"]
    assert int(port) > 0 and fake.started["stdin"] == ""
    # K and V take 512 bytes a token
    assert r.stderr == (
        "edgekv: the whole context of 4,096 tokens in each of 4 slots fits the free memory (8.0 MiB): nothing is "
        "evicted\n"
        f"edgekv: tiny is served at http://127.0.0.1:{port} (4 slots of 4,096 tokens); Ctrl-C stops it\n")


def test_what_is_not_ours_passes_through(model, fake):
    theirs = ["--top-k", "40", "-cb", "-ctxcp", "5", "-to", "600", "-s", "-1", "--chat-template-kwargs",
              '{"a": [1, 2]}', "--no-mmap", "--control-vector-layer-range", "1", "2",
              "--api-prefix", "/x", "--api-key", "k", "--log_prefix",
              "-hello=5", ""]
    r = serve(model, "--kv-evict", "none", *theirs[:7], "-np", 2, *theirs[7:])
    assert fake.started["argv"][-len(theirs):] == theirs and fake.value("-np") == "2"
    assert "/x (2 slots" in r.stderr
    # ours may stand anywhere, and in both spellings
    serve("--ctx_size=512", "-ngl", "-1", model, "--kv-evict=none", "--parallel", "1", "--batch-size", "64", "-fa", "1")
    assert [fake.value(flag) for flag in ("-m", "-c", "-ngl", "-np", "-b", "-ub", "-fa")] == [
        str(model), "512", "all", "1", "64", "64", "on"]
    serve("--top-k", "3", "-m", model, "--kv-evict", "none", "-a", "me", "-fit", "on", "--cache-idle-slots")
    argv = fake.started["argv"]
    assert argv[-7:] == ["--top-k", "3", "-a", "me", "-fit", "on", "--cache-idle-slots"]
    assert not {"--alias", "off", "--no-cache-idle-slots"} & set(argv)


def test_environment_variables_count(model, fake, monkeypatch):
    for name, value in {"KV_EVICT": "streaming", "KV_BUDGET": "x8", "KV_WINDOW": "16", "CTX_SIZE": "4096",
                        "N_PARALLEL": "2", "FLASH_ATTN": "true", "TOP_K": "7", "MODEL": "other.gguf", "ALIAS": "me",
                        "HF_REPO": "some/where"}.items():
        monkeypatch.setenv(f"LLAMA_ARG_{name}", value)
    r = serve(model, "--kv-window", 8)
    flags = ("-m", "--kv-evict", "--kv-budget", "--kv-window", "-c", "-np", "-fa", "--alias")
    assert [fake.value(flag) for flag in flags] == [str(model), "streaming", "x8", "8", "4096", "2", "on", None]
    assert "2 slots of 2,048 tokens, streaming keeps 256" in r.stderr
    # what is on the command line is gone, what is not ours stays
    left = {name for name in fake.started["env"] if name.startswith("LLAMA_ARG_")}
    assert left == {"LLAMA_ARG_TOP_K", "LLAMA_ARG_ALIAS"}


@pytest.mark.parametrize("wish, slots, n_ctx", [
    (["-c", "1000"], "4", 256), (["-c", "2049", "-np", "2"], "2", 1280), (["-c", "8192", "-np", "-1"], "4", 2048),
    (["-c", "2048", "-kvu"], "4", 2048), (["-c", "2048", "-kvu", "--no-kv-unified"], "4", 512)])
def test_slots_as_llama_cpp_rounds_them(model, fake, wish, slots, n_ctx):
    r = serve(model, "--kv-evict", "none", *wish)
    assert fake.value("-c") == wish[1] and fake.value("-np") == slots
    assert f"{slots} slots of {n_ctx:,} tokens" in r.stderr


@pytest.mark.parametrize("variable, n_ctx", [("KV_UNIFIED=0", 512), ("KV_UNIFIED=on", 2048), ("NO_KV_UNIFIED=1", 512)])
def test_one_cache_for_all_by_a_variable(model, fake, monkeypatch, variable, n_ctx):
    monkeypatch.setenv(*f"LLAMA_ARG_{variable}".split("="))
    assert f"4 slots of {n_ctx:,} tokens" in serve(model, "--kv-evict", "none", "-c", "2048").stderr


def test_layers_in_each_of_llama_cpps_spellings(model, fake):
    for flag in ("-ngl", "--gpu-layers", "--n-gpu-layers"):
        serve(model, "--kv-evict", "none", flag, 3)
        assert fake.value("-ngl") == "3" and not {"--gpu-layers", "--n-gpu-layers"} & set(fake.started["argv"])


def test_selection(model, fake):
    serve(model, "--kv-evict", "none", "--kv-select", "quest", "--kv-select-budget", "64", "--kv-page-size", "8",
          "--kv-dense-layers", "1", "--kv-grouped-attn")
    argv = fake.started["argv"]
    assert [fake.value(f"--kv-{name}") for name in ("select", "select-budget", "page-size", "dense-layers")] == [
        "quest", "64", "8", "1"]
    assert "--kv-grouped-attn" in argv and "--kv-evict" not in argv


def test_auto_shares_the_free_memory_among_the_slots(model, fake, monkeypatch):
    """512 bytes a token; 1 MiB is set aside for checkpoints; four fifths of what the model leaves free: 2 slots with
    500 tokens behind a ubatch of 64."""
    convert(model, fake.folder / "with.gguf", random_filters(GGUF(model)))
    model = fake.folder / "with.gguf"
    free = model.stat().st_size + 2 * (500 + 64) * 512 * 5 // 4 + (1 << 20)
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: free)
    r = serve(model, "-np", 2, "-ub", 64, "-cram", 1)
    assert fake.value("--kv-evict") == "kvdiff+qfilters+recency" and fake.value("--kv-budget") == "500"
    assert fake.value("--kv-filters") is None  # the server finds those in the file
    assert "in each of 2 slots (4.0 MiB) exceeds the free memory: 500 tokens are kept" in r.stderr
    fails("lower -np", "serve", model, "-np", 4, "-ub", 64, "-cram", 1, "--port", 0)
    # a wish that leaves nothing to evict
    serve(model, "--kv-budget", "99999")
    assert fake.value("--kv-evict") is None and fake.value("--kv-budget") is None


# --- filters ---------------------------------------------------------------------------------------------------------


EVICT = ("--kv-evict", "qfilters", "--kv-budget", "512")


def calibrated(monkeypatch):
    calls = []
    monkeypatch.setattr("edgekv.calibrate.calibrate",
                        lambda path, **_: calls.append(path) or random_filters(GGUF(path)))
    return calls


@pytest.fixture(scope="module")
def projector(tmp_path_factory):
    return write_tiny_projector(tmp_path_factory.mktemp("serve") / "mmproj.gguf")


def test_a_projector_passes_through(model, projector, fake, monkeypatch):
    common = (model, "-c", 512, "-np", 1, "--kv-evict", "none")
    for flags in (["-mm", projector, "--image-min-tokens", 4], ["--mmproj", model, "--mmproj", projector],  # the last counts
                  ["--mmproj-url", "http://127.0.0.1/m.gguf", "--mmproj", "to-be.gguf"]):
        serve(*common, *flags, "--kv-select", "quest")
        argv = fake.started["argv"]
        assert argv[-len(flags):] == list(map(str, flags)) and "--kv-evict" not in argv
    monkeypatch.setenv("LLAMA_ARG_MMPROJ", str(projector))
    serve(*common)
    assert fake.started["env"]["LLAMA_ARG_MMPROJ"] == str(projector)


def test_the_memory_of_a_projector_is_not_the_caches(model, projector, fake, monkeypatch):
    """What it takes is set aside before the context is said to fit."""
    given = []

    def auto(*_, aside: int, projector: int, **__):
        given.append((aside, projector))
        return "none", None

    monkeypatch.setattr("edgekv.cli.options.auto_policy", auto)
    for flags in ([], ["--mmproj", projector]):
        serve(model, "-c", 512, "--cache-ram", 0, *flags)
    assert given == [(0, 0), (0, projector.stat().st_size)]


@pytest.mark.parametrize(("n_gpu_layers", "free"), [(0, 1000 - 7 - 50), (-1, 400 - 50), (1, 400 + 1000 - 7 - 50)])
def test_where_a_projector_goes(model, monkeypatch, n_gpu_layers, free):
    """To the GPU where there is one; what is aside is of main memory."""
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: 1000)
    monkeypatch.setattr("edgekv.memory.gpu_bytes", lambda: 400)
    assert options._free_bytes([], n_gpu_layers, GGUF(model), aside=7, projector=50) == free


@pytest.mark.parametrize(("words", "slot", "told"), [
    ([], 4096, "beyond the 4,096 tokens"),
    (["--rope-scaling", "linear", "--rope-scale", "2"], 4096, ""),  # llama-server goes no further
    (["--rope-scaling", "yarn", "--rope-scale", "2"], 8192, ""),
    (["--rope-scaling", "yarn", "--rope-freq-scale", "0.75"], 5461, "stretched to 5,461"),
])
def test_slots_beyond_the_trained_context(model, fake, monkeypatch, words, slot, told):
    r = serve(model, "-c", 8192, "-np", 1, "--kv-evict", "none", *words)
    assert f"1 slot of {slot:,} tokens" in r.stderr and (told in r.stderr if told else "beyond" not in r.stderr)
    assert fake.started["argv"][-len(words):] == words or not words
    for flag, value in zip(words[::2], words[1::2]):
        name = flag[2:].replace("-", "_").upper()
        monkeypatch.setenv(f"LLAMA_ARG_{name}{'_TYPE' if name == 'ROPE_SCALING' else ''}", value)
    assert f"1 slot of {slot:,} tokens" in serve(model, "-c", 8192, "-np", 1, "--kv-evict", "none").stderr


def test_rope_flags_of_the_server_are_checked(model, fake):
    fails("--rope-scale x: must be a number", "serve", model, "--rope-scale", "x")
    fails("--rope-scale 0.0: must be a number above 0", "serve", model, "--rope-scale", "0")

@pytest.mark.parametrize("flag", ("-mm", "--mmproj", "--mmproj-url", "-mmu", "LLAMA_ARG_MMPROJ", "LLAMA_ARG_MMPROJ_URL"))
def test_a_projector_and_eviction(model, projector, fake, monkeypatch, flag):
    is_url = flag.lower().endswith(("url", "-mmu"))
    value = "http://127.0.0.1/m.gguf" if is_url else str(projector)
    words = [flag, value]
    if flag.isupper():
        monkeypatch.setenv(*words)
        words = []
    name = f"{'--mmproj-url' if is_url else '--mmproj'} {value} does not go with --kv-evict "
    why = ": a cache that holds images or sound cannot be evicted from; "
    for evict in ("streaming", "qfilters"):  # before filters are calibrated
        fails(name + evict + why + "drop one of them", "serve", model, "--kv-evict", evict, "--kv-budget", 64, *words)
    fails(name + "kvdiff+qfilters+recency" + why, "serve", model, "--kv-budget", 64, *words)
    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: 2 << 20)
    r = fails(name + "auto, which evicts here (the context of 16,384 tokens", "serve", model, "-c", 16384, "-np", 1,
              "--cache-ram", 0, *words)
    assert why + "give a smaller -c or -np, or --kv-evict none" in r.stderr
    assert fake.read("started") == []


def test_filters_are_calibrated_once(model, fake, monkeypatch):
    calls = calibrated(monkeypatch)
    assert "calibrating them once" in serve(model, *EVICT).stderr
    kept = fake.folder / "cache" / "filters" / f"{model_fingerprint(GGUF(model))}.gguf"
    assert fake.value("--kv-filters") == str(kept)
    assert "calibrating" not in serve(model, *EVICT).stderr and len(calls) == 1
    assert read(GGUF(kept)).flat().tobytes() == random_filters(GGUF(model)).flat().tobytes()
    # other policies need none
    serve(model, "--kv-evict", "streaming", "--kv-budget", "512")
    assert fake.value("--kv-filters") is None


def test_filters_where_nothing_can_be_kept(model, fake, monkeypatch, tmp_path):
    """They lie in a folder of their own while the server runs."""
    calibrated(monkeypatch)
    (tmp_path / "cache").write_text("in the way")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        r = edgekv("serve", model, *EVICT, "--port", 0)
        assert r.exit_code == 1 and "nor a temporary folder can be written to" in r.stderr.splitlines()[-1]
        serve(model, "--kv-evict", "none")  # nobody needs it
    serve(model, *EVICT)
    path = Path(fake.value("--kv-filters"))
    assert not path.exists() and not path.parent.exists()
    again = tmp_path / "again.gguf"
    again.write_bytes(bytes(fake.started["filters"]))
    assert read(GGUF(again)).flat().tobytes() == random_filters(GGUF(model)).flat().tobytes()


def test_filters_that_do_not_fit_lie_in_the_cache(model, fake, monkeypatch, tmp_path):
    """And cannot be replaced: the server gets the right ones all the same."""
    def full(*_):
        raise OSError("disk full")

    calibrated(monkeypatch)
    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    kept = tmp_path / "cache" / "filters" / f"{model_fingerprint(GGUF(model))}.gguf"
    kept.parent.mkdir(parents=True)
    convert(other, kept, random_filters(GGUF(other), seed=1))
    monkeypatch.setattr("edgekv.calibrate.save_filters", full)
    assert "not kept for the next time: disk full" in serve(model, *EVICT).stderr
    again = tmp_path / "again.gguf"
    again.write_bytes(bytes(fake.started["filters"]))
    assert read(GGUF(again)).model_sha256 == model_fingerprint(GGUF(model))


def test_filters_of_the_users(model, fake, monkeypatch, tmp_path):
    calls = calibrated(monkeypatch)
    own, other = tmp_path / "own.gguf", write_tiny_model(tmp_path / "other.gguf", seed=5)
    convert(model, own, random_filters(GGUF(model)))
    serve(model, *EVICT, "--kv-filters", own)
    assert fake.value("--kv-filters") == str(own) and not calls
    fails("--kv-evict streaming looks at no filters", "serve", model, "--kv-evict", "streaming", "--kv-budget", 64,
          "--kv-filters", own)
    fails("other.gguf: holds no Q-Filters", "serve", model, *EVICT, "--kv-filters", other)
    convert(other, other, random_filters(GGUF(other)))
    fails("other.gguf: Q-Filters were made for another model", "serve", model, *EVICT, "--kv-filters", other)


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why, arguments", [
    ("tiny.gguf: no such file", ["nowhere/tiny.gguf"]),
    ("--kv-evict none evicts nothing", ["{model}", "--kv-evict", "none", "--kv-budget", "4"]),
    ("--kv-window says what an eviction keeps", ["{model}", "--kv-evict", "none", "--kv-window", "4"]),
    ("--kv-filters f.gguf: filters say what", ["{model}", "--kv-evict", "none", "--kv-filters", "f.gguf"]),
    ("--keep 100 and --kv-window 0 exceed", ["{model}", "--kv-evict", "streaming", "--kv-budget", "64", "--keep", "100"]),
    ("--gpt-oss-20b-default: names a model", ["{model}", "--gpt-oss-20b-default"]),
    ("--kv-evict streaming needs --kv-budget", ["{model}", "--kv-evict", "streaming"]),
    ("--keep -1: must not be negative", ["{model}", "--kv-evict", "streaming", "--kv-budget", "64", "--keep", "-1"]),
    ("--kv-budget lots", ["{model}", "--kv-budget", "lots"]),
    ("--kv-select-budget is for selection", ["{model}", "--kv-select-budget", "64"]),
    ("--kv-select quest needs flash attention", ["{model}", "--kv-select", "quest", "-fa", "off"]),
    ("a quantised V needs flash attention", ["{model}", "-ctv", "q8_0", "-fa", "off"]),
    ("-np 0", ["{model}", "-np", "0"]),
    ("-hf: names a model", ["{model}", "-hf", "some/where"]),
    ("--host nowhere.invalid: is not known", ["{model}", "--host", "nowhere.invalid"]),
    ("--host 192.0.2.1: cannot assign", ["{model}", "--host", "192.0.2.1"]),
    ("RPC server 'here:x'", ["{model}", "--rpc", "here:x"]),
])
def test_what_is_refused_before_anything_starts(model, fake, why, arguments):
    fails(why, "serve", *[word.format(model=model) for word in arguments])
    assert not fake.read("started")


def test_usage(model, fake):
    fails("no MODEL", "serve", "--top-k", "3", status=2)
    fails("'-c'", "serve", model, "-c", status=2)
    fails("'-c'", "serve", model, "-c", "many", status=2)
    fails("'-ngl'", "serve", model, "-ngl", "some", status=2)
    assert not fake.read("started")
    text = edgekv("serve", "--help").stdout
    assert "Every other option of llama-server passes through" in text and "--kv-filters" not in text
    assert "--kv-filters" in edgekv("serve", "--help-all").stdout


def test_port_taken(model, fake, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        fails(f"--host 127.0.0.1 --port {port}: address already in use; give another", "serve", model, "--port", port)
        assert not fake.read("started")
        monkeypatch.setenv("FAKE_MODE", "fail")
        serve(model, "--kv-evict", "none", "--port", port, "--reuse-port")  # then that is the server's business
    assert fake.value("--port") == str(port)


USAGE = "\n\nusage:\n-x N    the option\n\nto show complete usage, run with -h\n"
LOADING = """0.00.004.387 I srv  llama_server: initializing ...
0.00.010.484 I srv    load_model: loading model 'x.gguf'
"""


@pytest.mark.parametrize("log, why", [
    ("error: invalid argument: --frob\n", "--frob: llama-server has no such flag"),
    ('error while handling argument "-n": stoi' + USAGE, "-n: the value is not a number"),
    ('error while handling argument "--top-k": expected value for argument' + USAGE, "--top-k: needs a value"),
    ('error while handling argument "--grammar-file": error: failed to open file \'/x\'' + USAGE,
     "--grammar-file: failed to open file '/x'"),
    ("--kv-evict kvdiff goes without --context-shift: drop one of them\n",
     "--kv-evict kvdiff goes without --context-shift: drop one of them"),
    (LOADING + "0.00.012.000 E srv         start: couldn't bind HTTP server socket, hostname: ::1, port: 8080\n"
     "0.00.012.500 E srv  llama_server: exiting due to HTTP server error\n",
     "--host ::1 --port 8080: cannot listen there"),
    (LOADING + "0.00.013.000 E llama_model_load: error loading model: missing tensor 'output.weight'\n"
     "0.00.013.100 E llama_model_load_from_file_impl: failed to load model\n"
     "0.00.013.200 E srv    load_model: failed to load model, 'x.gguf'\n"
     "0.00.013.300 I srv    operator(): operator(): cleaning up before exit...\n"
     "0.00.013.400 E srv  llama_server: exiting due to model loading error\n",
     "tiny.gguf: missing tensor 'output.weight'"),
    (LOADING + "0.00.013.000 E llama_init_from_model: failed to initialize the context: ALiBi cannot be evicted from\n"
     "0.00.013.400 E srv  llama_server: exiting due to model loading error\n",
     "tiny.gguf: ALiBi cannot be evicted from"),
    (LOADING + "0.00.013.002 E srv  init_listene: static assets path not found: /nope\n"
     "0.00.013.230 E srv  llama_server: failed to initialize HTTP server\n",
     "error: static assets path not found: /nope"),
    # without times, with colours
    (LOADING + "\033[31mE srv  init_listene: static assets path not found: /nope\033[0m\n",
     "error: static assets path"),
    ("", "did not say why"),
])
def test_one_line_when_it_cannot_start(model, fake, monkeypatch, log, why):
    for name, value in {"FAKE_MODE": "fail", "FAKE_STATUS": "3", "FAKE_LOG": log}.items():
        monkeypatch.setenv(name, value)
    fails(why, "serve", model, "--port", 0, status=3)


@pytest.mark.parametrize("mode, log, status, why", [
    ("abort", "/src/ggml.c:12: GGML_ASSERT(a == b) failed\n#1 0x00 in main", 134,
     "llama-server died (SIGABRT): GGML_ASSERT(a == b) failed"),
    ("abort", "anything", 134, "llama-server died (SIGABRT)"),
    ("killed", "", 137, "llama-server was killed (SIGKILL)"),
])
def test_one_line_when_it_dies_of_a_signal(model, fake, monkeypatch, mode, log, status, why):
    monkeypatch.setenv("FAKE_MODE", mode)
    monkeypatch.setenv("FAKE_LOG", log)
    fails(why, "serve", model, "--port", 0, status=status)


def test_death_after_it_was_up(model, fake, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "die")
    monkeypatch.setenv("FAKE_LATER", "/src/x.cpp:7: fatal error")
    r = serve(model, "--kv-evict", "none", status=134)
    up, error = r.stderr.splitlines()
    assert "is served at" in up and error == "edgekv: error: llama-server died (SIGABRT): fatal error"


def test_status_is_the_servers(model, fake, monkeypatch):
    monkeypatch.setenv("FAKE_STATUS", "7")
    serve(model, "--kv-evict", "none", status=7)


@pytest.mark.parametrize("host, key, warned", [
    ("0.0.0.0", {}, True), ("0.0.0.0", {"flag": ["--api-key", "k"]}, False), ("127.0.0.1", {}, False),
    ("localhost", {}, False), ("0.0.0.0", {"flag": ["--api-key-file", "f"]}, False),
    ("0.0.0.0", {"LLAMA_API_KEY": "k"}, False), ("0.0.0.0", {"flag": ["--api-key", ""]}, True)])
def test_warns_of_an_open_door(model, fake, monkeypatch, host, key, warned):
    for name in key.keys() - {"flag"}:
        monkeypatch.setenv(name, key[name])
    r = serve(model, "--kv-evict", "none", "--host", host, *key.get("flag", ()))
    assert r.stderr.count("warning: 0.0.0.0 can be reached by others") == r.stderr.count("warning") == warned
    assert fake.value("--host") == host


def test_log(model, fake, monkeypatch):
    """Quiet until it is up, then warnings and errors; -v shows all of it."""
    monkeypatch.setenv("FAKE_LOG", "0.00.001.315 I srv  x: starting\n0.00.001.400 W srv  x: a warning at the start")
    monkeypatch.setenv("FAKE_LATER", "1.02.001.315 I srv  x: busy\n1.02.001.316 W slot x: 700 tokens are read again")
    for how in ([], ["-v"], ["-lv", "5"]):
        r = serve(model, "--kv-evict", "none", *how)
        told = [line for line in r.stderr.splitlines() if "is served at" not in line]
        if how:
            assert [line for line in told if line] == [
                line for name in ("FAKE_LOG", "FAKE_LATER") for line in os.environ[name].splitlines()]
        else:
            assert told == ["edgekv: 700 tokens are read again"]
        assert ("-v" in fake.started["argv"], "-lv" in fake.started["argv"]) == (False, "-lv" in how)


def test_what_prints_and_ends(model, fake, capfd):
    r = edgekv("serve", model, "--kv-evict", "none", "--port", 0, "--version")
    assert (r.exit_code, r.stdout, r.stderr) == (0, "usage of llama-server\n", "")
    assert edgekv("serve", "--help-server").exit_code == 0
    assert capfd.readouterr().out == "usage of llama-server\n"


def test_without_a_server(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_LIB_PATH", str(tmp_path))
    with pytest.raises(server.EdgekvError, match="llama-server: no such file, this edgekv has no server"):
        server.program()


# --- signals, in a process of its own --------------------------------------------------------------------------------


class Running:
    """``edgekv serve`` of the fake program in a process of its own, once ``file`` is there."""

    def __init__(self, fake: Fake, model, mode: str, file: str, status: int = 0):
        code = f"""
            import signal
            from pathlib import Path
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born with it ignored
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as is this one under nohup
            from edgekv import server
            server.program = lambda: Path({str(fake.program)!r})
            from edgekv.cli import main
            main()"""
        self.fake = fake
        self.process = subprocess.Popen(
            [*python(textwrap.dedent(code)), "serve", str(model), "--kv-evict", "none", "--port", "0"],
            env={**os.environ, "FAKE_MODE": mode, "FAKE_STATUS": str(status)},
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # which the program must not read
        if file == "up":  # its own line comes after the program's
            self.line = self.process.stderr.readline()
        wait_for(lambda: self.process.poll() is not None or fake.read("started") and (fake.folder / file).exists())
        assert self.process.poll() is None, self.process.stderr.read()
        self.pid = fake.started["pid"]

    def end(self) -> tuple[int, str]:
        stderr = self.process.communicate(timeout=30)[1]
        assert not is_alive(self.pid)
        return self.process.returncode, stderr


@pytest.fixture
def running(fake, model):
    made = []

    def make(*args, **kwargs):
        made.append(Running(fake, model, *args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.communicate()
        if is_alive(each.pid):
            os.kill(each.pid, signal.SIGKILL)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # nobody may wait for an orphan in a container
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return sys.platform != "linux"


@pytest.mark.parametrize("sent, got", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_signals_are_passed_on_once(fake, running, sent, got):
    serving = running("stay", "up", status=5)
    assert "is served at http://127.0.0.1:" in serving.line
    # in a session of its own: a terminal's Ctrl-C does not reach it twice
    assert fake.started["session"] == serving.pid != os.getsid(serving.process.pid)
    serving.process.send_signal(getattr(signal, sent))
    assert serving.end() == (5, "") and fake.read("signals") == [got]


def test_a_second_signal_kills(fake, running):
    serving = running("deaf", "up")
    serving.process.send_signal(signal.SIGINT)
    wait_for(lambda: fake.read("signals"))
    assert serving.process.poll() is None
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == (137, "") and fake.read("signals") == ["SIGINT"]


def test_ctrl_c_while_it_loads(running):
    serving = running("load", "started")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == (130, "edgekv: error: interrupted\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell a child that its parent has gone")
@pytest.mark.parametrize("mode, file", [("deaf", "up"), ("load", "started")])
def test_no_server_outlives_it(running, mode, file):
    serving = running(mode, file)
    serving.process.kill()
    serving.process.wait()
    wait_for(lambda: not is_alive(serving.pid))


# --- the real one ----------------------------------------------------------------------------------------------------


try:
    server.program()
    _missing = False
except server.EdgekvError:
    _missing = True
real = pytest.mark.skipif(_missing, reason="this build has no llama-server")


def real_server(*args):
    process = subprocess.Popen(
        [*python("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
                 "from edgekv.cli import main; main()"), "serve", *map(str, args)],
        stderr=subprocess.PIPE, text=True)
    return process, process.stderr.readline()


@real
def test_it_answers_and_stops(model):
    process, line = real_server(model, "--kv-evict", "none", "-c", 1024, "-np", 2, "-t", 1, "--port", 0,
                                "--chat-template", "chatml")
    try:
        url = line.split(" is served at ")[1].split()[0]
        assert "(2 slots of 512 tokens)" in line

        def ask(path, **body):
            request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None,
                                             {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()

        assert json.loads(ask("/v1/models"))["data"][0]["id"] == "tiny"
        assert len(json.loads(ask("/props"))["default_generation_settings"]) and b"llamacpp:" in ask("/metrics")
        answer = json.loads(ask("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4))
        assert answer["usage"]["completion_tokens"] > 0
    finally:
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1]
    assert (process.returncode, stderr) == (0, "")


@real
def test_projectors_that_do_not_fit(model, tmp_path):
    def refuse(path):
        common = ("serve", model, "--kv-evict", "none", "-c", 512, "-np", 1, "-t", 1, "--port", 0, "--mmproj", path)
        return fails(f"--mmproj {path}: ", *common).stderr

    assert "no such file" in refuse(tmp_path / "nowhere.gguf")
    assert "is no projector of a multimodal model; give the file called mmproj" in refuse(model)
    other = write_tiny_projector(tmp_path / "other.gguf", n_embd=32)
    assert f"cannot be used with {model}: mismatch between text model (n_embd = 64) and mmproj (n_embd = 32)" in refuse(other)
    new = tmp_path / "new.gguf"
    new.write_bytes(other.read_bytes().replace(b"\x03\0\0\0\0\0\0\0mlp", b"\x03\0\0\0\0\0\0\0xyz"))
    assert "unknown projector type: xyz" in refuse(new)


@real
def test_it_listens_at_a_socket(model, tmp_path):
    path = tmp_path / "s.sock"
    for _ in range(2):  # what the first one leaves behind is no obstacle
        process, line = real_server(model, "--kv-evict", "none", "-c", 512, "-np", 1, "-t", 1, "--host", path)
        try:
            assert f"unix://{path}" in line and server.Address((str(path),), 0).answers()
            fails(f"--host {path}: a server listens there already", "serve", model, "--kv-evict", "none", "--host", path)
        finally:
            process.send_signal(signal.SIGTERM)
            stderr = process.communicate(timeout=30)[1]
        assert (process.returncode, stderr) == (0, "")
    path.unlink()
    path.write_text("a letter")
    fails(f"--host {path}: is a file", "serve", model, "--kv-evict", "none", "--host", path)
    assert path.read_text() == "a letter"


@real
def test_a_prefix_and_a_key(model):
    """Behind a prefix its /health wants a key, which does not keep us from seeing that it is up."""
    process, line = real_server(model, "--kv-evict", "none", "-c", 512, "-np", 1, "-t", 1, "--port", 0, "--api-prefix", "/x/",
                                "--api-key", "k")
    try:
        assert "/x/ (1 slot" in line
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


@real
@pytest.mark.parametrize("why, spoil, arguments", [
    ("--frob: llama-server has no such flag", None, ["--frob"]),
    ("--temp: the value is not a number", None, ["--temp", "warm"]),
    ("--top-k: needs a value", None, ["--top-k"]),
    ("static assets path not found: /nope", None, ["--path", "/nope"]),
    ("--context-shift does not go with --kv-evict streaming", None,
     ["--kv-evict", "streaming", "--kv-budget", "64", "--context-shift"]),
    ("spoilt.gguf: tensor 'output_norm.weight' not found", (b"output_norm.weight", b"outpux_norm.weight"), []),
])
def test_the_reasons_that_it_gives(model, tmp_path, why, spoil, arguments):
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(model.read_bytes().replace(*(spoil or (b"", b""))))
    fails(why, "serve", path, "--kv-evict", "none", "-c", 512, "-np", 1, "-t", 1, "--port", 0, *arguments)
