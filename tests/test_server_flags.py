"""The flags of the patched llama-server: what is refused, in which words, and what the cache is made of."""

import os
import re
import struct
import subprocess
from dataclasses import replace

import gguf
import numpy as np
import pytest

from edgekv import filters, native
from edgekv.convert import convert, save_filters
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.llama import window_layers
from edgekv.session import CACHE_TYPES, Session
from edgekv.settings import POLICIES, EvictionSettings, SelectionSettings, parse_budget
from served import llama_server, served  # noqa: F401  a fixture
from test_filters import random_filters
from test_split import split_model
from tinymodel import write_tiny_model

EVICT = ("--kv-evict", "streaming", "--kv-budget", "256")
WITH_FILTERS = ("--kv-evict", "qfilters", "--kv-budget", "256")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("flags") / "tiny.gguf")


@pytest.fixture
def run(llama_server, model):  # noqa: F811
    """Runs the server where it is expected to end by itself, and not by a signal; what it writes to stderr."""

    def run(*flags, path=model, **env):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        r = subprocess.run([llama_server, "-m", path, "--port", "0", "-t", "1", *map(str, flags)], text=True,
                           stdin=subprocess.DEVNULL, capture_output=True, timeout=30, env={**environment, **env})
        assert r.returncode > 0, r.stderr
        return r.stderr

    return run


@pytest.fixture
def refused(run):
    """The one line of an argument that is refused before anything is loaded."""

    def refused(*flags, **env):
        lines = [line for line in run(*flags, **env).splitlines() if line and not line.startswith("warn: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return refused


@pytest.fixture
def unfit(run):
    """The one line that says why the settings do not go with the model."""

    def unfit(*flags, path, **env):
        found = re.findall(r" E .*failed to initialize the context: (.*)", run(*flags, path=path, **env))
        assert len(found) == 1, found
        return found[0]

    return unfit


def reason(resolve, *args, **kwargs) -> str:
    """What the Python side says of the same settings."""
    with pytest.raises(EdgekvError) as refusal:
        resolve(*args, **kwargs)
    return str(refusal.value)


# --- arguments -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy, budget, window, keep", [
    ("none2", "256", None, None),
    ("", None, None, None), ("streaming", None, None, None), ("kvdiff+qfilters+recency", None, None, None),
    *[("keydiff", budget, None, None) for budget in (
        "lots", "0", "-7", "x0.5", "x", "8x", "1.5", "1.5iB", "1 2", "4 GiBs", "1e3", "99999999999", "9" * 21,
        "2147483648")],
    ("keydiff", "100", "97", None), ("keydiff", "100", "-1", None), ("keydiff", "100", "40", 61),
])
def test_eviction_is_refused_in_the_words_of_python(refused, policy, budget, window, keep):
    flags = [f"{flag}={value}".split("=", 1) for flag, value in (
        ("--kv-evict", policy), ("--kv-budget", budget), ("--kv-window", window), ("--keep", keep)) if value]
    if not policy:  # nothing evicts, and so nothing is wrong with the rest
        assert "--kv-evict none evicts nothing" in refused("--kv-budget", "256")
        return
    wanted = reason(EvictionSettings.resolve, policy, budget, window and int(window), keep, n_ctx=512)
    assert refused(*(word for flag in flags for word in flag)) == wanted


def test_policies(refused):
    """The lists of both sides are the same, and so are their parsers of them."""
    for policy in POLICIES[1:]:
        assert refused("--kv-evict", policy) == reason(EvictionSettings.resolve, policy, n_ctx=512)
    assert refused("--kv-evict", "x") == reason(EvictionSettings.resolve, "x", n_ctx=512)
    auto = refused("--kv-evict", "auto", "--kv-budget", "256")
    assert "--kv-evict auto" in auto and "edgekv serve" in auto and auto.endswith(", ".join(POLICIES))


@pytest.mark.parametrize("flags, wanted", [
    (["--kv-select", "quests"], dict(method="quests")),
    (["--kv-select-budget", "512"], dict(budget="512")),
    (["--kv-page-size", "16"], dict(page_size=16)),
    (["--kv-dense-layers", "1"], dict(dense_layers=1)),
    (["--kv-select", "quest", "--kv-page-size", "12"], dict(method="quest", page_size=12)),
    (["--kv-select", "quest", "--kv-page-size", "8, 16"], dict(method="quest", page_size="8, 16")),
    (["--kv-select", "quest", "--kv-select-budget", "31"], dict(method="quest", budget="31")),
    (["--kv-select", "quest", "--kv-select-budget", "127", "--kv-page-size", "64"],
     dict(method="quest", budget="127", page_size=64)),
    (["--kv-select", "quest", "--kv-select-budget", "-64"], dict(method="quest", budget="-64")),
    (["--kv-select", "quest", "--kv-select-budget", "x8"], dict(method="quest", budget="x8")),
    (["--kv-select", "quest", "--kv-select-budget", "4294967295"], dict(method="quest", budget="4294967295")),
    (["--kv-select", "quest", "--kv-dense-layers", "-1"], dict(method="quest", dense_layers=-1)),
])
def test_selection_is_refused_in_the_words_of_python(refused, flags, wanted):
    assert refused(*flags) == reason(SelectionSettings.resolve, **wanted)


@pytest.mark.parametrize("flags, why", [
    (["--kv-window", "16"], "--kv-window is for eviction: add --kv-evict"),
    (["--kv-filters", "f.gguf"], "--kv-filters is for eviction: add --kv-evict"),
    ([*EVICT, "--kv-filters", "f.gguf"], "looks at no filters, drop one of them"),
    ([*EVICT, "--kv-window", "many"], "--kv-window many: give a number of tokens"),
    (["--kv-select", "quest", "--kv-dense-layers", "two"], "--kv-dense-layers two: give a number of layers"),
    (["--kv-select", "quest", "-fa", "off"], "--kv-select quest needs flash attention: drop -fa off"),
    (["--kv-grouped-attn", "-fa", "off"], "--kv-grouped-attn needs flash attention: drop -fa off"),
    (["--kv-evict", "snapkv", "--kv-budget", "256", "--kv-filters"], "expected value for argument"),
])
def test_more_refusals(run, flags, why):
    assert why in run(*flags)


@pytest.mark.parametrize("flag", [
    "--context-shift", "--cache-reuse 64", "--kv-unified", "--kv-unified-per-slot 512", "--keep -1", "--keep -2",
    "--mmproj x.gguf", "--embedding", "--embeddings", "--reranking", "--model-draft x.gguf", "--spec-type ngram-mod",
    "--spec-default", "--swa-full",
])
def test_what_does_not_go_with_eviction(refused, run, flag):
    name = {"--embeddings": "--embedding", "--spec-default": "--spec-type"}.get(flag, flag.split()[0])
    for size in ("256", "x8"):
        line = refused("--kv-evict", "streaming", "--kv-budget", size, *flag.split())
        assert line.startswith(name) and " does not go with --kv-evict streaming: " in line, line
    # and nothing is said against it where nothing is evicted
    assert "--kv-evict" not in run("--kv-select", "quest", *flag.split(), path="nowhere.gguf")


def test_environment(refused, run):
    """Every flag has a twin in the environment; arguments win."""
    assert refused(LLAMA_ARG_KV_EVICT="lru") == reason(EvictionSettings.resolve, "lru", n_ctx=512)
    assert refused(*EVICT[:2], LLAMA_ARG_KV_BUDGET="lots").startswith("--kv-budget lots: give tokens (2048)")
    assert "--kv-window 300 exceed --kv-budget 256" in refused(*EVICT, LLAMA_ARG_KV_WINDOW="300")
    assert "--kv-filters nowhere.gguf: " in refused(*WITH_FILTERS, LLAMA_ARG_KV_FILTERS="nowhere.gguf")
    quest = dict(LLAMA_ARG_KV_SELECT="quest")
    assert refused(LLAMA_ARG_KV_SELECT="rand").startswith("--kv-select rand: unknown")
    assert refused(**quest, LLAMA_ARG_KV_SELECT_BUDGET="1").startswith("--kv-select-budget 1: must be two pages")
    assert refused(**quest, LLAMA_ARG_KV_PAGE_SIZE="5").startswith("--kv-page-size 5: choose")
    assert refused(**quest, LLAMA_ARG_KV_DENSE_LAYERS="-5").startswith("--kv-dense-layers -5: must not")
    assert refused("-fa", "off", LLAMA_ARG_KV_GROUPED_ATTN="1").startswith("--kv-grouped-attn needs flash")

    wrong = dict(LLAMA_ARG_KV_EVICT="lru", LLAMA_ARG_KV_BUDGET="lots", LLAMA_ARG_KV_WINDOW="300",
                 LLAMA_ARG_KV_SELECT="rand", LLAMA_ARG_KV_GROUPED_ATTN="1")
    said = run(*EVICT, "--kv-window", "16", "--kv-select", "none", "--no-kv-grouped-attn", "-fa", "off",
               path="nowhere.gguf", **wrong)
    assert "failed to load model" in said  # as far as nothing is wrong with the arguments
    # what is set but empty, as compose files do, counts as not set
    empty = {name: "" for name in wrong if name != "LLAMA_ARG_KV_GROUPED_ATTN"}
    assert "failed to load model" in run(path="nowhere.gguf", **empty)


def test_help(llama_server):  # noqa: F811
    """Help lists the flags whatever the environment says."""
    r = subprocess.run([llama_server, "--help"], capture_output=True, text=True, timeout=30,
                       env={**os.environ, "LLAMA_ARG_KV_EVICT": "lru"})
    flags = ("evict", "budget", "window", "filters", "select", "select-budget", "page-size", "dense-layers",
             "grouped-attn")
    assert r.returncode == 0 and all(f"--kv-{flag} " in r.stdout.replace(",", " ") for flag in flags)
    assert all(f"LLAMA_ARG_KV_{flag.upper().replace('-', '_')})" in r.stdout for flag in flags)


# --- what needs the model --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    dict(), dict(arch="gemma3", n_layer=5), dict(arch="lfm2", n_layer=5, n_head=2), dict(n_head_kv=1, head_size=48),
], ids=str)
@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "f16"), ("f32", "q4_0")], ids="-".join)
def test_bytes_of_a_token(tmp_path, change, types):
    """Against the figure from the file's header, and against a real cache."""
    path = write_tiny_model(tmp_path / "m.gguf", **change)
    header, kinds = GGUF(path), [CACHE_TYPES[name] for name in types]
    found = native.token_bytes(path, *kinds)
    assert found == (header.kv_bytes_per_token(*map(native.type_block, kinds), without=window_layers(header)) or 0)
    if found:
        with Session(path, n_ctx=512, type_k=types[0], type_v=types[1], flash_attn=True) as session:
            stats = native.stats(session.ctx)
            assert stats.k_bytes + stats.v_bytes == found * stats.cells_allocated


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("f32", "q8_0")], ids="-".join)
@pytest.mark.parametrize("change", [dict(), dict(arch="gemma3", n_layer=5)], ids=str)
def test_budgets_of_the_model(unfit, tmp_path, change, types):
    """Shares of a sequence's context and sizes in bytes, as the Python side computes them: a window that is too large
    makes the server say which budget it found."""
    path = write_tiny_model(tmp_path / "m.gguf", **change)
    header = GGUF(path)
    blocks = [native.type_block(CACHE_TYPES[name]) for name in types]
    per_token = header.kv_bytes_per_token(*blocks, without=window_layers(header))
    for flags, n_ctx in ((["-c", "4096", "-np", "2"], 2048), (["-c", "3000", "-np", "1"], 3072), (["-np", "1"], 4096)):
        for budget in ("x8", "X2.5", "x1", "64KiB", "0.1 MB", "200kB", "70000b"):
            line = unfit(*EVICT[:2], "--kv-budget", budget, "--kv-window", "100000", *flags, "-ctk", types[0],
                         "-ctv", types[1], "-fa", "on", path=path)
            tokens = parse_budget(budget, n_ctx=n_ctx, bytes_per_token=per_token)
            assert line.startswith(f"--keep 4 and --kv-window 100000 exceed --kv-budget {tokens}: "), line
            if "x" not in budget.lower() and n_ctx != 2048:
                break  # sizes do not depend on the context: once each is enough


def test_budgets_that_the_model_makes_impossible(unfit, tmp_path, model):
    assert unfit(*EVICT[:2], "--kv-budget", "100b", path=model) == "--kv-budget 100b: must leave at least 1 token"
    assert unfit(*EVICT[:2], "--kv-budget", "9999999GB", path=model) == "--kv-budget 9999999GB: too large"
    narrow = write_tiny_model(tmp_path / "narrow.gguf", n_head_kv=1, head_size=48)
    line = unfit(*EVICT[:2], "--kv-budget", "1MiB", "-ctk", "q8_0", "-fa", "on", path=narrow)
    assert line == "--kv-budget 1MiB: a size in bytes is not known for this model, give tokens"


# --- filters ---------------------------------------------------------------------------------------------------------

def flat_norms(monkeypatch):
    """Norms get a second dimension, of 1, as in some published models: it is part of the fingerprint."""
    add = gguf.GGUFWriter.add_tensor

    def with_rows(self, name, tensor, *args, **kwargs):
        add(self, name, tensor[None] if "norm" in name else tensor, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", with_rows)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2", "split", "flat norms"])
def test_filters_of_a_model(llama_server, unfit, tmp_path, monkeypatch, kind):  # noqa: F811
    """Those in a file of their own and those in the model's; another model's are refused whatever their shape."""
    if kind == "flat norms":
        flat_norms(monkeypatch)
    change = dict(arch=kind, n_layer=4) if kind in ("gemma3", "lfm2") else {}
    if kind == "lfm2":
        change["head_size"] = 16
    path = write_tiny_model(tmp_path / "m.gguf", **change)
    monkeypatch.undo()
    if kind == "split":
        path = split_model(path, tmp_path / "parts.gguf", empty_first=True)[0]
    header = GGUF(path)
    made = random_filters(header)
    own, alone, other = (tmp_path / f"{name}.gguf" for name in ("own", "alone", "other"))
    save_filters(alone, header, made)
    save_filters(other, header, replace(made, model_sha256="0" * 64))

    assert f"{path}: has no Q-Filters: run `edgekv convert {path} --with-qfilters`" in unfit(*WITH_FILTERS, path=path)
    line = unfit(*WITH_FILTERS, "--kv-filters", other, path=path)
    assert line.startswith(f"--kv-filters {other}: Q-Filters were made for another model"), line
    with served(llama_server, path, *WITH_FILTERS, "--kv-filters", alone, "-np", "1") as server:
        assert server.cache()["eviction"] == {"policy": "qfilters", "budget": 256, "window": 64}
    if kind != "split":
        convert(path, own, made)
        with served(llama_server, own, *WITH_FILTERS, "-np", "1"):
            pass
        own.write_bytes(own.read_bytes().replace(made.model_sha256.encode(), b"0" * 64))
        assert unfit(*WITH_FILTERS, path=own).startswith(f"{own}: Q-Filters were made for another model")


def test_damaged_filters(refused, tmp_path, model):
    """As the Python side says it, before the model is loaded."""
    header = GGUF(model)
    made = random_filters(header)
    save_filters(tmp_path / "f.gguf", header, made)
    good = (tmp_path / "f.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"

    def says(data: bytes) -> str:
        bad.write_bytes(data)
        line = refused(*WITH_FILTERS, "--kv-filters", bad)
        assert line.startswith(f"--kv-filters {bad}: "), line
        return line.removeprefix("--kv-filters ")

    def python() -> str:
        return reason(lambda: filters.read(GGUF(bad)).validate(header, bad))

    number = made.vectors[1][1].tobytes()
    sizes = [np.array([32, n], np.int32).tobytes() for n in (32, 33, 31, -1)]
    for old, new in (
        (number[:4], np.float32(np.nan).tobytes()), (number, bytes(len(number))),
        (b"qfilters.version\4\0\0\0\1", b"qfilters.version\4\0\0\0\2"), (b"keep-high", b"keep-loww"),
        (b"qfilters.sign", b"qfilters.sine"), (b"qfilters.layers", b"qfilters.strata"),
        (b"qfilters.model_sha256", b"qfilters.model_sha257"), *[(sizes[0], size) for size in sizes[1:]],
        (b"GGUF\3", b"GGUF\7"), (b"GGUF", b"GGML"),
    ):
        assert good.count(old) == 1, old
        assert says(good.replace(old, new)) == python(), (old, new)
    # each within the file, all together not: so little file must not ask for so much memory
    named = [b"norm%d" % i for i in range(3)]
    tensors = b"".join(struct.pack(f"<Q{len(n)}sIQIQ", len(n), n, 1, 100, 0, 0) for n in named)
    assert "lies on others" in says(struct.pack("<4sIQQ", b"GGUF", 3, len(named), 0) + tensors + bytes(1000))
    for n in (0, 3, 10, 100, len(good) // 2, len(good) - 1):
        assert "GGUF file" in says(good[:n])
    for name in (b"a\nb", b"x" * 100_000):  # names in messages: one short line, whatever they are
        line = says(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(name)) + name + struct.pack("<I", 99))
        assert "metadata of type 99" in line and len(line) < len(str(bad)) + 400, line
    assert "holds no Q-Filters" in says(model.read_bytes())
    assert "is a folder" in refused(*WITH_FILTERS, "--kv-filters", tmp_path)
    assert "No such file" in refused(*WITH_FILTERS, "--kv-filters", tmp_path / "nowhere.gguf")


# --- what it makes of them -------------------------------------------------------------------------------------------

def test_off_is_off(llama_server, model):  # noqa: F811
    with served(llama_server, model) as server:
        assert "eviction:" not in server.log and "selection:" not in server.log
        assert server.cache() == {"enabled": False}


def test_what_the_cache_is_made_of(llama_server, model):  # noqa: F811
    flags = ["--kv-evict", "keydiff", "--kv-budget", "x8", "--kv-select", "quest", "--kv-select-budget", "128",
             "--kv-page-size", "8", "--kv-dense-layers", "1", "-c", "4096", "-np", "2", "-ub", "64"]
    with served(llama_server, model, *flags, env={"LLAMA_ARG_KV_WINDOW": "40", "LLAMA_ARG_KV_EVICT": "lru"}) as server:
        cache = server.cache()
        assert cache["enabled"] is True
        assert cache["eviction"] == {"policy": "keydiff", "budget": 256, "window": 40}
        assert cache["selection"] == {"method": "quest", "budget": 128, "page_size": 8, "dense_layers": 1}
        # budget and a ubatch, up to the next 256
        assert [(slot["n_ctx"], slot["cells_allocated"]) for slot in cache["slots"]] == [(2048, 512)] * 2
        assert server.get("/props").json["total_slots"] == 2
        assert "eviction: keydiff, 256 tokens of a sequence stay, the last 40 and the first 4 always\n" in server.log
        assert "selection: quest, a step reads 128 tokens in pages of 8, but all in the first 1 layers\n" in server.log


def test_measuring_memory_knows_the_settings(llama_server, model):  # noqa: F811
    """-fit measures contexts that evict: 2^20 tokens of the whole cache would be 512 MiB."""
    with served(llama_server, model, *EVICT, "-c", 1 << 20, "-np", 1, "-fit", "on", "-lv", 4) as server:
        found = [int(n) for n in re.findall(r"projected to use (\d+) MiB of", server.log)]
        assert found and max(found) < 256, server.log
