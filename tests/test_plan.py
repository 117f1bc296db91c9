"""The plan against what the runtime allocates: real contexts of a real and of tiny models, an 8B model of which only
the header exists (llama.cpp simulates its allocations), and layers in another process's memory.
"""

import ctypes
import json
import os
import re
import shlex
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekv import plan, rpc
from edgekv.cli.common import format_bytes
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.plan import GIB, Device, Setting, find_device, largest_budget, memory, most_layers, propose, read_model
from edgekv.settings import DEFAULT_POLICY, EvictionSettings, SelectionSettings
from header import write_header
from process import edgekv, fails, python
from test_filters import random_filters
from test_rpc import Server
from test_split import split_model
from tinymodel import write_tiny_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    return write_header(tmp_path_factory.mktemp("header") / "8b.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    shape = {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_head_kv": 2, "head_size": 64, "n_ff": 1024, "n_vocab": 2048}
    return {arch: write_tiny_model(folder / f"{arch}.gguf", arch=arch, n_ctx=32768, **shape)
            for arch in ("llama", "gemma3", "lfm2")}


@pytest.fixture(scope="module")
def server():
    with Server() as found:
        yield found


# --- what the runtime says -------------------------------------------------------------------------------------------


class Runtime:
    """What llama.cpp allocates for a setting, in bytes: from the statistics of the cache, and from its log where there
    are none (in MiB with two digits). ``hollow``: it simulates, so that what is larger than the machine will do."""

    def __init__(self, path, s, *, rpc_servers="", hollow=False):
        from edgekv import native, session

        import llama_cpp

        log = []

        @llama_cpp.llama_log_callback
        def collect(_level, text, _data):
            log.append(text.decode(errors="replace"))

        llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
        model = ctx = None
        try:
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = s.n_gpu_layers
            if hollow:
                params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
            if rpc_servers:
                devices = rpc.devices(rpc_servers)
                params.devices = ctypes.addressof(devices)
            model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
            assert model, log[-5:]
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = s.n_ctx, s.n_seq, 1, 1
            params.n_batch = params.n_ubatch = s.n_ubatch
            params.type_k, params.type_v = session.CACHE_TYPES[s.type_k], session.CACHE_TYPES[s.type_v]
            params.flash_attn_type, params.swa_full = int(s.flash_attn), s.swa_full
            eviction = selection = filters = None
            if s.policy != "none":
                eviction = EvictionSettings.resolve(s.policy, s.budget, n_ctx=s.n_ctx // s.n_seq)
                filters = random_filters(GGUF(path)) if "qfilters" in s.policy else None
            if s.page_size:
                selection = SelectionSettings.resolve("quest", page_size=s.page_size, dense_layers=s.dense_layers)
            native.set_next(eviction, filters, selection)
            ctx = llama_cpp.llama_init_from_model(model, params)
            assert ctx, (native.last_error(), log[-5:])
            self.stats = native.stats(ctx)
            self.weights = llama_cpp.llama_model_size(model)
            self.log = "".join(log)
        finally:
            if ctx:
                llama_cpp.llama_free(ctx)
            if model:
                llama_cpp.llama_model_free(model)
            native.silence()

    def logged(self, what, place=""):
        """Bytes of the buffers of a kind (model, KV, RS, compute, output) whose name begins with ``place``."""
        found = re.findall(rf"(\S+)\s+{what} buffer size =\s+([0-9.]+) MiB", self.log)
        return MIB * sum(float(size) for name, size in found if name.startswith(place))

    @property
    def total(self):
        s = self.stats
        return self.weights + s.kv_bytes + s.scratch_bytes + self.logged("compute") + self.logged("output")


SETTINGS = {
    "f16, -fa off": Setting(8192, flash_attn=False),
    "f16": Setting(6000, n_ubatch=300),
    "q8_0, quest": Setting(8192, type_k="q8_0", type_v="q8_0", page_size=16),
    "mixed, pages of 32": Setting(4096, type_k="q8_0", type_v="f16", page_size=32, dense_layers=0),
    "evicted, -fa off": Setting(8192, n_ubatch=128, flash_attn=False, policy=DEFAULT_POLICY, budget=700),
    "evicted, q4_0, quest, two sequences": Setting(16384, 2, 256, "q4_0", "q4_0", policy=DEFAULT_POLICY, budget=1024,
                                                   page_size=16),
}


def agrees(path, s, **how):
    found, there = memory(read_model(GGUF(path)), s), Runtime(path, s, **how)
    ours, stats = found.all, there.stats
    assert found.cells == stats.cells_allocated
    assert (ours.k, ours.v, ours.summaries) == (stats.k_bytes, stats.v_bytes, kv_summaries(there, stats, how))
    assert ours.kv + ours.summaries == stats.kv_bytes
    assert ours.total == pytest.approx(there.total, rel=0.05)
    return ours, there


def kv_summaries(there, stats, how):
    """Where nothing is allocated, the statistics of the selection are not kept: what is left of the cache."""
    return stats.kv_bytes - stats.k_bytes - stats.v_bytes if how.get("hollow") else stats.summary_bytes


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", ["smollm2", "gemma3", "lfm2"])
def test_a_plan_is_what_the_runtime_allocates(model, name, smollm2, tiny):
    path = smollm2 if model == "smollm2" else tiny[model]
    ours, there = agrees(path, SETTINGS[name])
    assert ours.weights == there.weights
    assert ours.weights == pytest.approx(there.logged("model"), rel=0.02)  # whole pages of the file
    assert ours.scratch == pytest.approx(there.stats.scratch_bytes, abs=4096)  # alignment of a few tensors
    assert ours.compute == pytest.approx(there.logged("compute") + there.logged("output"), rel=0.1)


@pytest.mark.parametrize("s", [
    Setting(8192, 4, swa_full=False), Setting(4096, n_ubatch=64, policy="kvdiff", budget=512)])
def test_windows_of_the_server_and_of_evictions(s, tiny):
    agrees(tiny["gemma3"], s)


def test_a_window_by_the_architectures_own_pattern(tmp_path):
    from edgekv import native

    small = {"n_layer": 13, "n_embd": 256, "n_head": 2, "n_head_kv": 1, "n_ff": 256, "n_vocab": 256}
    def fourth(w):
        w.add_sliding_window(512)
        w.add_uint32("gemma3.attention.sliding_window_pattern", 4)

    headers = [lambda w: w.add_sliding_window(512), lambda w: None, lambda w: w.add_sliding_window(0), fourth]
    for i, more in enumerate(headers):
        path = write_header(tmp_path / f"{i}.gguf", arch="gemma3", more=more, **small)
        model = read_model(GGUF(path))
        windows = [il for il, layer in enumerate(model.layers) if layer.kind == "window"]
        assert windows == native.swa_layers(path)
        assert bool(windows) == (i in (0, 3)) == (model.window == 512)


# --- a GPU that is not here: layers in the memory of another process -------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_partial_offload(arch, layers, tiny, server):
    s = Setting(4096, n_gpu_layers=layers)
    there, found = Runtime(tiny[arch], s, rpc_servers=server.endpoint), memory(read_model(GGUF(tiny[arch])), s)
    rounding = 0.01 * MIB + 4096
    assert found.device.weights == pytest.approx(there.logged("model", "RPC"), abs=rounding)
    assert found.device.kv == pytest.approx(there.logged("KV", "RPC") + there.logged("RS", "RPC"), abs=2 * rounding)
    assert found.host.kv == pytest.approx(there.logged("KV", "CPU") + there.logged("RS", "CPU"), abs=2 * rounding)
    # of one layer alone attention and feed-forward take less than is planned
    compute = there.logged("compute", "RPC")
    assert compute <= 1.02 * found.device.compute <= (2 if 1 < layers < 5 else 1.15) * compute
    assert found.all.total == pytest.approx(there.total, rel=0.1)


def test_a_gpu_gets_a_copy_of_tied_embeddings(smollm2, server):
    there = Runtime(smollm2, Setting(512, n_gpu_layers=-1), rpc_servers=server.endpoint)
    model = read_model(GGUF(smollm2))
    found = memory(model, Setting(512, n_gpu_layers=-1))
    assert model.tied_bytes > 0 and found.all.weights == model.weight_bytes + model.tied_bytes
    assert found.device.weights == pytest.approx(there.logged("model", "RPC"), abs=0.01 * MIB + 4096)


# --- the case people care about --------------------------------------------------------------------------------------


def test_8b_at_4_bits_with_128k_tokens_on_8_gb(llama_8b, server):
    model = read_model(GGUF(llama_8b))
    # the sum of llama.cpp's own Q4_K_M is 4.58 GiB; 32 layers of 8 heads of 128 channels
    assert model.weight_bytes / GIB == pytest.approx(4.58, abs=0.01)
    caches = plan.ladder(model, Setting(131072, n_gpu_layers=-1), plan.LADDER)
    cells = 131072 * 32 * 8 * 128 * 2
    assert [memory(model, s).all.kv for s in caches] == [cells * 2, cells * 34 // 32, cells * 18 // 32]

    card = find_device("rtx4060")
    evicted, partial = propose(model, caches, card)
    s = evicted.setting
    assert (s.type_k, s.type_v, s.policy, s.n_gpu_layers) == ("q4_0", "q4_0", DEFAULT_POLICY, -1)
    assert 60_000 < s.budget < 70_000 and (s.budget + 512) % 256 == 0
    larger = plan.replace(s, budget=s.budget + 256)
    assert evicted.memory.device.total <= 7 * GIB < memory(model, larger).device.total
    p = partial.setting
    assert (p.type_k, p.policy) == ("q8_0", "none") and 10 < p.n_gpu_layers < 25
    assert partial.memory.device.total <= 7 * GIB < memory(
        model, Setting(131072, type_k="q8_0", type_v="q8_0", n_gpu_layers=p.n_gpu_layers + 1)).device.total

    # what the runtime would put on the device with these flags; it simulates, the cache of the server stays empty
    for s, found in ((s, evicted.memory), (p, partial.memory)):
        there = Runtime(llama_8b, s, rpc_servers=server.endpoint, hollow=True)
        assert found.all.k + found.all.v == there.stats.kv_bytes
        assert found.device.compute == pytest.approx(there.logged("compute", "RPC"), rel=0.02)
        assert found.host.compute == pytest.approx(there.logged("compute", "CPU") + there.logged("output"), rel=0.1)


@pytest.mark.parametrize("s", [
    Setting(131072, type_k="q4_0", type_v="q4_0"), Setting(131072, flash_attn=False), Setting(131072, n_ubatch=2048),
    Setting(131072, page_size=16), Setting(131072, policy=DEFAULT_POLICY, budget=16384)])
def test_8b_on_a_cpu(s, llama_8b):
    agrees(llama_8b, s, hollow=True)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_layers_of_different_widths(flash_attn, tmp_path):
    path = write_header(tmp_path / "deci.gguf", arch="deci", n_layer=3, n_embd=512, n_head=4, n_head_kv=[1, 4, 2],
                        n_ff=512, n_vocab=16384)
    ours, _ = agrees(path, Setting(2048, flash_attn=flash_attn), hollow=True)
    assert (ours.v > ours.k) != flash_attn  # without it all rows of V are as wide as the widest


def test_mixtures_of_experts(tmp_path):
    def experts(w):
        w.add_expert_count(8)
        w.add_expert_used_count(4)

    path = write_header(tmp_path / "dense.gguf", n_layer=1, n_embd=1024, n_head=8, n_ff=2048, n_vocab=256, more=experts)
    model = read_model(GGUF(path))
    # 8 heads of 128, four experts' gate, up and product of 2,048 channels, three rows of 1,024; masks of 2 bytes
    per_token = 4 * (8 * 128 + 3 * 4 * 2048 + 3 * 1024) + 2 * 4096
    assert memory(model, Setting(4096)).all.compute == 512 * per_token + 4 * 256


# --- invariants ------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    heads, head = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([64, 128]))
    kinds = draw(st.lists(st.sampled_from(["full", "window", "none"]), min_size=1, max_size=12)) + ["full"]
    layers = tuple(plan.Layer(kind, heads, head, head, 1000 * (kind == "none"), draw(st.integers(0, 1 << 28)))
                   for kind in kinds)
    window = draw(st.sampled_from([64, 1024])) if "window" in kinds else 0
    return plan.Model("m.gguf", "", "llama", 1 << 17, layers, heads * head, window, 2 * heads,
                      draw(st.integers(64, 8192)), draw(st.integers(64, 30000)), 0, draw(st.integers(256, 200000)), 0,
                      draw(st.integers(0, 1 << 28)),
                      draw(st.integers(0, 1 << 28)), 0)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(300, 1 << 17), st.integers(1, 1024), st.integers(0, 1 << 34), st.booleans())
def test_what_is_proposed_is_the_most_that_fits(model, n_ctx, n_ubatch, room, flash_attn):
    s = Setting(n_ctx, n_ubatch=n_ubatch, policy="kvdiff", flash_attn=flash_attn, n_gpu_layers=-1)

    def needs(budget):
        return memory(model, plan.replace(s, budget=budget)).device.total

    budget = largest_budget(model, s, lambda found: found.device.total <= room)
    least = -(-(256 + s.ubatch) // 256) * 256 - s.ubatch
    assert budget == 0 or (budget >= 256 and needs(budget) <= room and budget <= s.n_ctx_seq)
    if max(budget + 256, least) + s.ubatch <= s.n_ctx_seq:
        assert needs(max(budget + 256, least)) > room

    full = plan.replace(s, policy="none")
    n = most_layers(model, full, room)
    totals = [memory(model, plan.replace(full, n_gpu_layers=i)).device.total for i in range(model.all_layers + 1)]
    assert totals[n] <= room and all(total > room for total in totals[n + 1:])
    assert sum(memory(model, plan.replace(full, n_gpu_layers=n)).all.weights for n in (0, -1)) == 2 * model.weight_bytes


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(1, 1 << 17), st.integers(1, 1 << 17), st.integers(1, 4), st.sampled_from(plan.LADDER))
def test_more_costs_no_less(model, n_ctx, budget, n_seq, kind):
    s = Setting(n_ctx, n_seq, type_k=kind, type_v=kind)
    evicted = plan.replace(s, policy=DEFAULT_POLICY, budget=budget)
    full = memory(model, s).all
    assert memory(model, evicted).all.k <= full.k
    assert memory(model, plan.replace(s, n_ctx=2 * n_ctx)).all.total >= full.total
    assert memory(model, plan.replace(s, page_size=16)).all.total >= full.total
    assert memory(model, plan.replace(evicted, budget=2 * budget)).all.total >= memory(model, evicted).all.total
    assert memory(model, plan.replace(s, swa_full=False)).all.windows <= full.windows


# --- machines --------------------------------------------------------------------------------------------------------


def test_the_table_of_machines():
    found = plan.devices()
    names = [device.name for device in found]
    assert len(set(names)) == len(names) >= 40
    for device in found:
        assert device.kind in ("discrete", "unified") and GIB <= device.memory <= 1024 * GIB and device.source
        assert device.bandwidth is None or 50 < device.bandwidth < 2000
        assert find_device(device.name) is device and 0 < device.room() < device.memory
    assert find_device("GeForce RTX 4060") == find_device("rtx-4060") and find_device("rtx4060").memory == 8 * GIB
    assert find_device("Apple M4 Pro 24 GB").name == "m4pro-24gb"
    assert find_device("Radeon RX 7900 XTX").memory == 24 * GIB
    assert find_device("8GiB").memory == find_device("8 gb").memory == 8 * GIB
    assert find_device("512MiB").memory == GIB // 2
    assert (find_device("8GiB").room(), find_device("m4-16gb").room(), find_device("8GiB").room(1)) == (
        7 * GIB, 12 * GIB, 8 * GIB - 1)


def test_unified_memory_holds_both_parts(llama_8b):
    model = read_model(GGUF(llama_8b))
    found = memory(model, Setting(8192, n_gpu_layers=-1))
    assert Device("", "", "unified", GIB).needs(found) == found.device.total + found.host.total
    (best,) = propose(model, plan.ladder(model, Setting(131072, n_gpu_layers=-1), plan.LADDER), find_device("m1-8gb"))
    assert best.fits and best.setting.policy == DEFAULT_POLICY
    (best,) = propose(model, [Setting(131072, n_gpu_layers=-1)], Device("", "", "unified", 4 * GIB))
    assert not best.fits


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(llama_8b, tmp_path):
    r = edgekv("plan", llama_8b, "--ctx", "131072", "--gpu", "rtx4060", "--plot", tmp_path / "bars.svg")
    assert r.exit_code == 0 and "proposed: no full cache fits; in q4_0 the best" in r.stdout
    assert "32,768 tokens kept" in r.stdout and "f16, quest" in r.stdout and "| -ngl 11 |" in " ".join(r.stdout.split())
    commands = [shlex.split(line) for line in r.stdout.splitlines() if line.startswith("    edgekv run ")]
    facts = json.loads(edgekv("plan", llama_8b, "-c", "131072", "--gpu", "rtx4060", "-o", "json").stdout)
    (device,) = facts["devices"]
    assert [shlex.split(p["command"]) for p in device["proposals"]] == commands and len(commands) == 2
    assert all(p["device"]["total"] <= device["room"] == 7 * GIB for p in device["proposals"])
    assert facts["model"]["weight_bytes"] == sum(t.nbytes for t in GGUF(llama_8b).tensors.values())
    svg = (tmp_path / "bars.svg").read_text()
    assert "q4_0" in svg and "room on GeForce RTX 4060" in svg and "20.55" in svg

    from edgekv.cli.run import run  # what is proposed must be options of that command

    for command in commands:
        run.make_context("run", command[2:], ignore_unknown_options=False)


def test_every_machine_without_gpu(tiny):
    r = edgekv("plan", tiny["llama"])
    assert r.exit_code == 0 and all(device.name in r.stdout for device in plan.devices())
    r = edgekv("plan", tiny["llama"], "-ngl", "0")
    assert r.exit_code == 0 and r.stdout and "machines" not in r.stdout
    # a budget that somebody wants counts there too
    r = edgekv("plan", tiny["llama"], "-c", "100000000", "--kv-budget", "4096")
    assert "4,096 tokens" in r.stdout.split("machines", 1)[1]


def test_a_draft_is_not_loaded(tmp_path):
    """Layers that predict further tokens are for --spec-type, and llama.cpp leaves their tensors in the file."""
    def shape(n_layer, more=lambda w: None):
        return read_model(GGUF(write_header(tmp_path / f"{n_layer}.gguf", arch="glm4", n_layer=n_layer, n_embd=256, n_head=2,
                                            n_ff=256, n_head_kv=1, n_vocab=256, more=more)))

    drafted = shape(3, lambda w: w.add_nextn_predict_layers(1))
    assert drafted.layers[-1].weight_bytes == 0 < drafted.layers[0].weight_bytes
    whole = shape(3)
    assert drafted.weight_bytes == whole.weight_bytes - whole.layers[-1].weight_bytes


def test_a_server_on_the_cpu_has_flash_attention(llama_8b):
    """As llama-server's auto decides: without it a mask of the whole context would be counted."""
    (row, *_), (want, *_) = (json.loads(edgekv("plan", llama_8b, "-c", "131072", "-np", "4", "-ngl", "0", "-o", "json", *fa)
                                        .stdout)["settings"] for fa in ((), ("-fa", "on")))
    assert row["flash_attn"] is True and row == want


def test_what_does_not_fit_is_not_proposed(llama_8b):
    r = edgekv("plan", llama_8b, "-c", "131072", "--gpu", "m1-8gb", "--kv-evict", "none")
    assert r.exit_code == 0 and "nothing fits: no cache of this context fits" in r.stdout and "proposed" not in r.stdout
    r = edgekv("plan", llama_8b, "-c", "131072", "--gpu", "m1-8gb", "--kv-budget", "60000")
    assert "proposed: --kv-budget 60000 fits no cache; no full cache fits; in q4_0 the best" in r.stdout


def test_a_plan_loads_no_native_library(tiny):
    code = ("import sys; from edgekv.cli import main\n"
            f"try: main(['plan', {str(tiny['gemma3'])!r}, '--gpu', '8GiB'])\n"
            "except SystemExit as e: assert not e.code\n"
            "assert not {'llama_cpp', 'edgekv.native'} & set(sys.modules)\n"
            "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
            "assert 'libllama' not in maps")
    subprocess.run(python(code), check=True, stdout=subprocess.DEVNULL)


def test_the_beginning_of_a_file_will_do(llama_8b, tmp_path):
    cut = tmp_path / "8b.gguf"
    with open(llama_8b, "rb") as file:
        cut.write_bytes(file.read(GGUF(llama_8b).parts[0].infos_end))
    plans = [json.loads(edgekv("plan", path, "-o", "json", "--gpu", "8GiB").stdout) for path in (llama_8b, cut)]
    assert plans[0]["settings"] == plans[1]["settings"]
    fails("truncated GGUF file", "inspect", cut)


def test_split_models(tiny, tmp_path):
    first = split_model(tiny["llama"], tmp_path / "split.gguf", 3, empty_first=True)[0]
    whole, found = (json.loads(edgekv("plan", path, "-o", "json", "--gpu", "8GiB").stdout)
                    for path in (tiny["llama"], first))
    assert found["settings"] == whole["settings"]
    (tmp_path / "split-00003-of-00003.gguf").unlink()
    fails("split-00003-of-00003.gguf: no such file", "plan", first)


def test_windows_of_run(tiny):
    """`edgekv run` keeps windows alone, and the plan counts so; the note says who does not."""
    facts = json.loads(edgekv("plan", tiny["gemma3"], "-o", "json", "-ngl", "0", "--kv-evict", "none", "-ctk", "f16", "-ctv", "f16",
                              "-c", "4096").stdout)
    told = " ".join(facts["notes"])
    assert "edgekv run, as planned here" in told and "edgekv chat lets layers with a sliding window keep" in told
    r = edgekv("run", tiny["gemma3"], "-p", "x", "-n", 1, "-c", 4096, "--kv-evict", "none", "-t", 1, "-no-cnv")
    host = facts["settings"][0]["host"]
    assert host["windows"] < host["k"]
    assert f"KV cache {format_bytes(host['k'] + host['v'] + host['windows'])}," in r.stderr, r.stderr


def test_options(tiny):
    path = tiny["gemma3"]

    def rows(*args):
        facts = json.loads(edgekv("plan", path, "-o", "json", *args).stdout)
        return [(s["type_k"], s["type_v"], s["flash_attn"], s["budget"], s["page_size"]) for s in facts["settings"]]

    assert rows("-ctk", "q8_0", "--kv-evict", "none") == [("q8_0", "f16", True, 0, 0), ("q8_0", "f16", True, 0, 16)]
    assert rows("-fa", "off") == [("f16", "f16", False, budget, 0) for budget in (0, 8192, 4096, 2048)]
    assert rows("-ngl", "0", "--kv-budget", "x4")[:4] == [
        ("f16", "f16", False, 0, 0), ("q8_0", "q8_0", True, 0, 0), ("q4_0", "q4_0", True, 0, 0),
        ("f16", "f16", False, 8192, 0)]
    assert {row[4] for row in rows("--kv-select", "quest", "--kv-page-size", "32")} == {32}

    from edgekv.llama import bytes_per_token

    (tokens,) = {row[3] for row in rows("--kv-budget", "1MiB") if row[3]}
    assert tokens == MIB // bytes_per_token(GGUF(path), "1MiB", None, None)
    served = json.loads(edgekv("plan", path, "-np", "4", "--gpu", "8GiB", "-o", "json").stdout)
    assert "edgekv serve" in served["devices"][0]["proposals"][0]["command"]
    assert served["settings"][0]["window_cells"] == 768 and served["settings"][0]["cells"] == 8192


def test_errors(tiny, tmp_path, llama_8b):
    path = tiny["llama"]
    fails("--gpu rtx4061: not in the table of machines; the nearest names are rtx4060", "plan", path, "--gpu",
          "rtx4061")
    fails("lists the names", "plan", path, "--gpu", "?")
    fails("--gpu m4: there are several sizes, choose m4-16gb", "plan", path, "--gpu", "m4")
    fails("must be larger than nothing", "plan", path, "--gpu", "0GiB")
    fails("--kv-evict none evicts nothing", "plan", path, "--kv-evict", "none", "--kv-budget", "512")
    fails("needs flash attention", "plan", path, "-fa", "off", "-ctv", "q8_0")
    fails("needs flash attention", "plan", path, "-fa", "off", "--kv-select", "quest")
    fails("give a file that ends in", "plan", path, "--plot", tmp_path / "x.pdf")
    fails("--kv-budget 0", "plan", path, "--kv-budget", "0")
    (tmp_path / "text.gguf").write_text("This is a text, and no model at all.")
    fails("text.gguf: not a GGUF file", "plan", tmp_path / "text.gguf")
    fails("no such file", "plan", tmp_path / "nope.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:700])
    fails("cut.gguf: truncated GGUF file", "plan", tmp_path / "cut.gguf")

    def header(name, arch, more=lambda w: None, **changes):
        small = {"n_layer": 2, "n_embd": 256, "n_head": 2, "n_head_kv": 1, "n_ff": 256, "n_vocab": 256}
        return write_header(tmp_path / name, arch=arch, more=more, **{**small, **changes})

    fails("is an encoder", "plan", header("bert.gguf", "bert"))
    fails("is an encoder", "plan", header("causal.gguf", "qwen3", lambda w: w.add_causal_attention(False)))
    fails("has no KV cache", "plan", header("mamba.gguf", "mamba2"))
    fails("latent or sparse attention", "plan", header("mla.gguf", "deepseek2", lambda w: w.add_key_length_mla(192)))
    fails("gives no sensible context length", "plan", header("ctx.gguf", "llama", n_ctx=0))
    fails("has 600 layers, and llama.cpp takes 512", "plan", header("deep.gguf", "llama", n_layer=600))
    fails("-ngl 0 puts nothing on a card", "plan", path, "-ngl", "0", "--gpu", "8GiB")
    fails("needs a --kv-budget of at least 4", "plan", path, "--kv-evict", "snapkv", "--kv-budget", "3")
    fails("a cache of its own kind", "plan", header("loops.gguf", "nanbeige", lambda w: w.add_uint32("nanbeige.num_loops", 2)))
    vl = header("vl.gguf", "qwen2vl")
    fails("the cache cannot be evicted from: it has M-RoPE", "plan", vl, "--kv-budget", "512")
    r = edgekv("plan", vl, "-c", "4096", "--gpu", "2GiB")
    assert r.exit_code == 0 and "note: the cache cannot be evicted from: it has M-RoPE" in r.stdout
    assert "kept" not in r.stdout
    odd = header("odd.gguf", "llama", head=80, n_embd=256)
    r = edgekv("plan", odd, "-c", "4096")
    assert "q8_0 does not go with heads of 80 channels" in r.stdout and "| q8_0" not in r.stdout
    unknown = header("swa.gguf", "qwen2", lambda w: w.add_sliding_window(4096))
    assert "all are counted as full" in edgekv("plan", unknown, "-c", "4096").stdout


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_one_error(data, tiny, tmp_path):
    path = tiny[data.draw(st.sampled_from(["llama", "gemma3", "lfm2"]))]
    blob = bytearray(path.read_bytes()[: GGUF(path).parts[0].infos_end])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 8) | st.integers(0, 1500))
        value = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8) | st.just(bytes(8)))
        blob[at : at + len(value)] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(blob)
    try:
        model = read_model(GGUF(damaged, header_only=True))
        for s in plan.ladder(model, Setting(4096, n_gpu_layers=-1), plan.LADDER):
            assert memory(model, s).all.total >= 0
    except EdgekvError as error:
        assert str(error).startswith(str(damaged))
