"""Speed and memory of a model across settings: the library behind ``edgekv bench``.

How it measures:

- A run is one setting at one depth in a process of its own, so that its peak memory is its own; no two processes
  compute at a time. Runs are interleaved: every setting once, then every setting again.
- A run warms up with a short prompt and a short decode that are discarded, then fills the context from empty
  (``prompt @ dD``), decodes at that depth (``tgN @ dD``) and reads a prompt behind it (``ppN @ dD``).
- Under eviction, at a depth above the budget, the cache breathes between ``budget`` and ``budget + n_ubatch`` tokens,
  and each eviction takes time. So decode is averaged over whole cycles: N is rounded up to a multiple of ``n_ubatch``
  tokens, wherever in the cycle they begin. A prompt is repeated until it fills a cycle, too. One test goes on where
  the last one ended: tokens that were evicted cannot come back. ``n_tokens`` says how many tokens were measured.
- Otherwise nothing is evicted; N tokens are measured at exactly that depth, and removed again.
- ``fill="copies"``: where nothing is evicted, only the first tokens of the context are read and the rest of its cells are
  copies of theirs, which takes seconds instead of minutes (:mod:`edgekv.fill`); there is no ``prompt @ dD`` then.
- A trace notes the memory after each ubatch, and after each 16th token of a decode.
- The tokens are random but always the same ones; nothing is sampled. Logits of the last token of each batch are
  computed, as by llama-bench.
- Before anything is timed, every setting with eviction is checked (:func:`_check`), and every run compares the number
  of cells and evictions with what the rule of eviction says.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

import edgekv
from edgekv import _runtime, native
from edgekv.errors import EdgekvError
from edgekv.fill import fill_with_copies
from edgekv.gguf_file import GGUF
from edgekv.llama import load_filters
from edgekv.meter import DeviceMeter, Trace, peak_rss_bytes
from edgekv.rpc import exit_on_loss, gpu_layers
from edgekv.session import CACHE_TYPES, Session, default_threads
from edgekv.settings import FLOAT_TYPES, EvictionSettings, RopeSettings, SelectionSettings, needs_filters

import llama_cpp



FILLS = ("read", "copies")
N_READ = 1024  # tokens that copies are made of
TRACE_EVERY = 16  # tokens of a decode


@dataclass(frozen=True)
class Setting:
    """What one run measures; ``depth`` is the number of tokens in the context before the tests, ``fill`` one of ``FILLS``."""

    eviction: EvictionSettings
    selection: SelectionSettings
    depth: int
    flash_attn: bool
    type_k: str
    type_v: str
    n_threads: int
    n_ubatch: int
    n_gpu_layers: int
    rpc: str = ""  # servers, as --rpc has them
    rope: RopeSettings = RopeSettings()
    fill: str = "read"

    @property
    def evicts(self) -> bool:
        """Whether tokens are evicted for good: below the budget a setting is the same as ``none``."""
        return self.eviction.policy != "none" and self.depth > self.eviction.budget

    @property
    def copies(self) -> int:
        """Tokens of the context that are read before the rest is filled with copies of them, 0: it is read."""
        fits = self.fill == "copies" and self.eviction.policy == "none" and self.depth > N_READ
        return N_READ if fits else 0

    def tokens(self, n: int, prompt: bool) -> int:
        """How many tokens a test of ``n`` measures: whole cycles under eviction."""
        if not self.evicts:
            return n
        step = n if prompt else self.n_ubatch
        return -(-max(n, self.n_ubatch) // step) * step

    def __str__(self) -> str:
        e = self.eviction
        policy = e.policy if e.policy == "none" else f"{e.policy} {e.budget}"
        if self.selection.needs_flash_attention:
            policy += f", --kv-select {self.selection}"
        if self.rope != RopeSettings():
            policy += f", RoPE {self.rope}"
        return (f"{policy}, -fa {'on' if self.flash_attn else 'off'}, -ctk {self.type_k}, -ctv {self.type_v}, "
                f"-t {self.n_threads}, -ub {self.n_ubatch}, -d {self.depth}")


def plan(
    gguf: GGUF,
    *,
    kv_evict: Sequence[str] = ("none",),
    kv_budget: Sequence[str | int] = (),
    kv_window: int | None = None,
    keep: int | None = None,
    kv_select: Sequence[str] = ("none",),
    kv_select_budget: Sequence[str | int] = (),
    kv_page_size: Sequence[int] = (),
    kv_dense_layers: int | None = None,
    kv_grouped_attn: Sequence[bool] = (False,),
    depths: Sequence[int] = (0,),
    flash_attn: Sequence[bool] = (True,),
    types_k: Sequence[str] = ("f16",),
    types_v: Sequence[str] = ("f16",),
    n_threads: Sequence[int] = (),
    n_ubatch: Sequence[int] = (512,),
    n_gpu_layers: Sequence[int] = (),
    rpc: str = "",
    rope: RopeSettings = RopeSettings(),
    fill: str = "read",
) -> list[Setting]:
    """Every combination once; ``none`` has no budget, so there is one of it however many budgets there are. Selection
    needs flash attention, so there is none of it with ``off``.

    A budget such as ``x8`` is a share of the depth.

    Raises:
        EdgekvError: naming the flag that is wrong, or the model that lacks filters.
    """
    for flag, names in (("-ctk", types_k), ("-ctv", types_v)):
        for name in names:
            if name not in CACHE_TYPES:
                raise EdgekvError(f"{flag} {name}: unknown cache type, choose one of {', '.join(CACHE_TYPES)}")
    if not all(flash_attn):
        for name in types_v:
            if name not in FLOAT_TYPES:
                raise EdgekvError(f"-ctv {name}: a quantised V needs flash attention, drop off from -fa")

    if "quest" not in kv_select:  # says which flag is too much
        SelectionSettings.resolve("none", *(next(iter(values), None) for values in (kv_select_budget, kv_page_size)),
                                  kv_dense_layers)
    selections = dict.fromkeys(
        SelectionSettings.resolve(method, *((None, None, None) if method == "none" else (budget, size, kv_dense_layers)), grouped)
        for method, budget, size, grouped in product(kv_select, kv_select_budget or (None,), kv_page_size or (None,),
                                                     kv_grouped_attn)
    )
    if any(s.needs_flash_attention for s in selections) and not any(flash_attn):
        raise EdgekvError("--kv-select quest and --kv-grouped-attn need flash attention: add on to -fa")

    settings = []
    for policy, budget, depth, fa, tk, tv, t, ub, ngl in product(
        kv_evict, kv_budget or (None,), depths, flash_attn, types_k, types_v, n_threads or (default_threads(),),
        n_ubatch, n_gpu_layers or (gpu_layers(None, rpc),),
    ):
        per_token = gguf.kv_bytes_per_token(*(native.type_block(CACHE_TYPES[name]) for name in (tk, tv))) or 0
        eviction = EvictionSettings.resolve(policy, budget, kv_window, keep, n_ctx=depth, bytes_per_token=per_token)
        settings += [Setting(eviction, selection, depth, fa, tk, tv, t, ub, ngl, rpc, rope, fill) for selection in selections
                     if fa or not selection.needs_flash_attention]
    if any(map(needs_filters, kv_evict)):
        load_filters(gguf)
    return list(dict.fromkeys(settings))


def bench(
    model: str | os.PathLike[str],
    settings: Sequence[Setting],
    *,
    n_gen: Sequence[int] = (128,),
    n_prompt: Sequence[int] = (512,),
    repetitions: int = 5,
    bandwidth: bool = False,
    trace: list[dict[str, Any]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure; one row per setting and test, in the order of the settings.

    Args:
        n_gen, n_prompt: tokens of the tests ``tgN`` and ``ppN``; 0 leaves the test out.
        bandwidth: measure how fast the memory can be read, too.
        trace: gets the memory over time, a row per sample; the GPU is waited for at each.
        report: told what runs next.

    Raises:
        EdgekvError: a check failed or a context cannot be created.
    """
    gguf = GGUF(model)
    n_gen, n_prompt = ([n for n in dict.fromkeys(numbers) if n > 0] for numbers in (n_gen, n_prompt))
    if not (n_gen or n_prompt) and not any(s.depth and not s.copies for s in settings):
        raise EdgekvError("nothing to measure: give one of -n, -p and -d a number above 0; with --fill copies -n or -p")

    checks: dict[str, Setting] = {}
    for s in settings:
        if s.eviction.policy != "none" or s.selection.needs_flash_attention:
            # the check's context is as small as it can be: the depth does not matter
            checks.setdefault(json.dumps([asdict(s.eviction), asdict(s.selection), s.flash_attn, s.type_k, s.type_v,
                                          s.n_gpu_layers]), s)
    for i, s in enumerate(checks.values()):
        report(f"check {i + 1} of {len(checks)}: {s}")
        _in_worker("check", gguf, s)

    speeds = {}
    if bandwidth:
        report("memory bandwidth")
        speeds = {t: read_bandwidth(t) for t in {s.n_threads for s in settings}}

    results: list[list[dict[str, Any]]] = [[] for _ in settings]
    for r in range(repetitions):
        for i, s in enumerate(settings):
            report(f"repetition {r + 1} of {repetitions}, setting {i + 1} of {len(settings)}: {s}")
            result = _in_worker("run", gguf, s, n_gen=n_gen, n_prompt=n_prompt, trace=trace is not None)
            if trace is not None:
                trace += [{**_setting(s), "repetition": r + 1, **sample} for sample in result.pop("trace")]
            results[i].append(result)

    rows = []
    for s, runs in zip(settings, results):
        rows += _rows(gguf, s, runs, speeds.get(s.n_threads))
    return rows


_COUNTS = ("n_selections", "pages_read", "pages_total", "bytes_read")
_TIMES = ("summarize", "scores", "choice", "attn", "dense")  # of our operators, per token


def _setting(s: Setting) -> dict[str, Any]:
    e, q = s.eviction, s.selection
    evicts, selects = e.policy != "none", q.method != "none"
    return {
        "threads": s.n_threads,
        "n_gpu_layers": s.n_gpu_layers,
        "rpc": s.rpc or None,
        "n_ubatch": s.n_ubatch,
        "flash_attn": s.flash_attn,
        "type_k": s.type_k,
        "type_v": s.type_v,
        "kv_evict": e.policy,
        "kv_budget": e.budget if evicts else None,
        "kv_window": e.window if evicts else None,
        "keep": e.keep if evicts else None,
        "kv_select": q.method,
        "kv_select_budget": (q.budget or "auto") if selects else None,
        "kv_page_size": q.page_size if selects else None,
        "kv_dense_layers": q.dense_layers if selects else None,
        "kv_grouped_attn": q.grouped_attention,
        "rope": str(s.rope) or None,
        "depth": s.depth,
        "copied_from": s.copies or None,
    }


def _rows(gguf: GGUF, s: Setting, runs: list[dict[str, Any]], mem_gb_s: float | None) -> list[dict[str, Any]]:
    first = runs[0]
    weights = weight_bytes(gguf)
    cell = (first["k_bytes"] + first["v_bytes"]) / first["cells_allocated"]
    rows = []
    for tests in zip(*(run["tests"] for run in runs)):
        test = tests[0]
        speeds = [t["n_tokens"] / t["seconds"] for t in tests]
        evict_s = [t["evict_us"] / 1e6 for t in tests]
        t_s = statistics.fmean(speeds)
        decodes = test["test"].startswith("tg")
        steps = test["n_selections"]
        # what steps must read of the cache; where they select, all of it in the dense layers only
        kv_read = cell * test["cells_mean"]
        if steps == test["n_tokens"]:
            kv_read = kv_read * first["dense_share"] + test["bytes_read"] / steps
        rows.append({
            "model": gguf.path.name,
            "model_type": first["model_type"],
            "model_size": first["model_size"],
            "model_n_params": first["model_n_params"],
            "backend": first["backend"],
            "cpu_variant": first["cpu_variant"],
            **_setting(s),
            "test": test["test"],
            "t_s": t_s,
            "t_s_sd": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
            "reps": len(runs),
            "samples_ts": speeds,
            "n_tokens": test["n_tokens"],
            "cells_used": test["cells_used"],
            "cells_mean": test["cells_mean"],
            "cells_allocated": first["cells_allocated"],
            "kv_bytes": first["kv_bytes"],
            "scratch_bytes": first["scratch_bytes"],
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "peak_device_bytes": max((run["peak_device_bytes"] for run in runs), key=lambda n: n or 0),
            "device_source": first["device_source"],
            "n_evictions": test["n_evictions"],
            "evict_ms": statistics.fmean(evict_s) * 1e3,
            "evict_share": statistics.fmean(x / t["seconds"] for x, t in zip(evict_s, tests)),
            "summary_bytes": first["summary_bytes"],
            "n_selections": steps,
            # of one step: pages over all layers that are selected from and their KV heads
            "pages_read": test["pages_read"] / steps if steps else None,
            "pages_total": test["pages_total"] / steps if steps else None,
            "bytes_read": test["bytes_read"] / steps if steps else None,
            **{f"{name}_ms": statistics.fmean(t[f"{name}_us"] for t in tests) / 1e3 / test["n_tokens"]
               for name in _TIMES},
            # what a step must read at the least, weights once and the cache once, per second
            "gb_s": (weights + kv_read) * t_s / 1e9 if decodes else None,
            "mem_gb_s": mem_gb_s,
            "edgekv": edgekv.__version__,
            "llama_cpp_python": _runtime.BINDINGS_VERSION,
            "machine": machine(),
            "test_time": first["test_time"],
        })
    return rows


def weight_bytes(gguf: GGUF) -> int:
    """Bytes of weights that one token reads: one row of the embeddings unless they are the output too, and only as
    many experts as are used."""
    count = gguf.get(f"{gguf.architecture}.expert_count", 0) or 1
    used = gguf.get(f"{gguf.architecture}.expert_used_count", 0) or count
    embeddings = {"per_layer_token_embd.weight"}
    if "output.weight" in gguf.tensors:
        embeddings.add("token_embd.weight")
    total = 0
    for t in gguf.tensors.values():
        if t.name in embeddings:
            continue
        total += t.nbytes * used // count if "_exps." in t.name else t.nbytes
    return total


def read_bandwidth(n_threads: int, size: int = 256 << 20) -> float:
    """GB/s at which ``n_threads`` threads read memory together; the best of three, each over ``size`` bytes."""
    data = np.ones(size // 4, np.float32)
    parts = np.array_split(data, n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:  # NumPy lets go of the interpreter's lock while it reduces
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, size / (time.perf_counter() - start) / 1e9)
    return best


def machine() -> str:
    """Processor, processors and system, for the record."""
    name = platform.processor() or platform.machine()
    try:
        if sys.platform == "darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True,
                                  check=True).stdout.strip()
        else:
            with open("/proc/cpuinfo") as file:
                name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"


# --- the other process ---------------------------------------------------------------------------------------------


def _in_worker(task: str, gguf: GGUF, setting: Setting, **extra: Any) -> dict[str, Any]:
    """Run ``task`` in a new process and return its answer.

    Raises:
        EdgekvError: what the worker raised, or how it died.
    """
    # the worker may be killed, and its temporary files can be as large as a cache
    with tempfile.TemporaryDirectory(prefix="edgekv-") as folder:
        job = {"task": task, "model": os.fspath(gguf.path), "setting": asdict(setting), "folder": folder, **extra}
        return _ask_worker(job, gguf, setting)


def _ask_worker(job: dict[str, Any], gguf: GGUF, setting: Setting) -> dict[str, Any]:
    # the same modules as here, wherever this process found them
    code = f"import sys; sys.path[:] = {sys.path!r}; from edgekv import bench; bench.worker()"
    with tempfile.TemporaryFile() as log:
        p = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other one
        )
        try:
            answer = p.stdout.read()
            status = p.wait()
        finally:
            p.kill()
            p.wait()
            p.stdin.close()
            p.stdout.close()
        log.seek(0)
        said = log.read().decode(errors="replace").splitlines()

    try:
        result = json.loads(answer)
    except ValueError:
        # an assertion's own line comes before its backtrace, an exception's after it
        lines = [line.strip() for line in said if line.strip()]
        asserted = [line for line in lines if "ASSERT" in line]
        why = (asserted or lines[-1:] or ["no message"])[0]
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise EdgekvError(f"{gguf.path}: the process that measured ({setting}) ended with {how}: {why}") from None
    if "error" in result:
        raise EdgekvError(result["error"])
    return result


def worker() -> None:
    """The worker's main function: does the job in ``sys.argv[1]`` and answers with one JSON object."""
    # what libraries print must not get into the answer
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    job = json.loads(sys.argv[1])
    tempfile.tempdir = job["folder"]
    raw = job["setting"]
    setting = Setting(**{**raw, "eviction": EvictionSettings(**raw["eviction"]),
                         "selection": SelectionSettings(**raw["selection"]), "rope": RopeSettings(**raw["rope"])})
    if setting.rpc:
        exit_on_loss(setting.rpc)
    try:
        if job["task"] == "check":
            _check(job["model"], setting)
            result: dict[str, Any] = {}
        else:
            result = _run(job["model"], setting, job["n_gen"], job["n_prompt"], job["trace"])
    except EdgekvError as error:
        result = {"error": str(error)}
    except MemoryError:
        result = {"error": f"{job['model']}: out of memory ({setting})"}
    json.dump(result, answer)
    answer.close()


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed, however the parent ended
    os._exit(1)


def _open(model: str, s: Setting, n_ctx: int, eviction: EvictionSettings, selection: SelectionSettings) -> Session:
    filters = load_filters(GGUF(model)) if needs_filters(eviction.policy) else None
    return Session(model, n_ctx=n_ctx, n_ubatch=s.n_ubatch, n_threads=s.n_threads, flash_attn=s.flash_attn,
                   type_k=s.type_k, type_v=s.type_v, n_gpu_layers=s.n_gpu_layers, rpc_servers=s.rpc, settings=eviction,
                   filters=filters, selection=selection, rope=s.rope)


def _check(model: str, s: Setting) -> None:
    """Check a setting with eviction or selection against what must hold.

    Below the budget the logits have the same bits as without eviction; an eviction leaves exactly the budget, and
    every head has kept the first and the last tokens. The budget is made smaller than the setting's for speed. A step
    that selects reads as many pages as it should, and our attention on the whole cache gives stock's logits but for the
    rounding of a quantised model's activations.

    Raises:
        EdgekvError: naming the setting and what does not hold.
    """
    def must(holds: Any, what: str) -> None:
        if not holds:
            raise EdgekvError(f"{model}: check failed ({s}): {what}")

    if s.selection.needs_flash_attention:
        _check_selection(model, s, must)
    e = s.eviction
    if e.policy == "none":
        return
    budget = min(e.budget, max(256, e.keep + e.window + 64))
    e = EvictionSettings(e.policy, budget, e.window, e.keep)
    n = budget + 8
    short = max(1, budget // 2)

    def logits(session: Session) -> list[np.ndarray]:
        out = []
        for i in range(0, short, s.n_ubatch):
            out.append(session.decode(tokens[i : min(i + s.n_ubatch, short)], i, logits="last"))
        for i in range(short, min(short + 4, budget)):
            out.append(session.decode(tokens[i : i + 1], i, logits="last"))
        return out

    off = SelectionSettings("none")
    with _open(model, s, budget + s.n_ubatch, EvictionSettings(), off) as session:
        tokens = _tokens(session, n + 1)
        want = logits(session)
        must(all(np.isfinite(x).all() for x in want), "the model gives NaN or infinite logits")
    with _open(model, s, budget + s.n_ubatch + 256, e, off) as session:
        got = logits(session)
        must(all(a.tobytes() == b.tobytes() for a, b in zip(want, got)),
             "below the budget the logits differ from none's")
        done = session.stats(0).cells_used
        session.read(tokens[done:n], done)
        if session.stats(0).n_evictions == 0:
            session.evict()
        used, n_evictions = session.stats(0).cells_used, session.stats(0).n_evictions
        must(n_evictions, "nothing was evicted")
        # with the smallest ubatches it evicted by itself and went on
        must(budget <= used <= budget + s.n_ubatch, f"{used} cells are used after an eviction to {budget}")
        for i, layer in enumerate(session.layers()):
            for h in range(layer.n_head_kv):
                kept = session.positions(i, h)
                first, last = np.arange(min(e.keep, n)), np.arange(n - e.window, n)
                must(len(kept) == used and (np.diff(kept) > 0).all()
                     and np.array_equal(kept[: e.keep], first) and np.array_equal(kept[used - e.window :], last),
                     f"layer {layer.il}, KV head {h} has not kept the first {e.keep} and the last {e.window} tokens")
        must(np.isfinite(session.decode(tokens[n:], n, logits="last")).all(),
             "NaN or infinite logits after an eviction")


def _check_selection(model: str, s: Setting, must: Callable[[Any, str], None]) -> None:
    q = s.selection
    page, n = q.page_size, 512
    few = SelectionSettings(q.method, 4 * page, page, q.dense_layers)  # pages, however large the setting's budget
    got = {}
    for name, selection in (("none", SelectionSettings("none")), ("all", SelectionSettings("none", grouped_attention=True)),
                            ("covered", SelectionSettings(q.method, n + page, page, q.dense_layers)), ("few", few)):
        with _open(model, s, n, EvictionSettings(), selection) as session:
            tokens = _tokens(session, n)
            session.read(tokens[:-1])
            got[name] = session.decode(tokens[-1:], n - 1, logits="last")
            stats, n_heads = session.stats(), sum(layer.n_head_kv for layer in session.layers() if layer.il >= q.dense_layers)
    must(got["none"].tobytes() == got["covered"].tobytes(), "where the budget covers the cache the logits differ from none's")
    error = float(((got["all"] - got["none"]) ** 2).sum() / (got["none"] ** 2).sum())
    must(error < 0.02, f"attention on the whole cache: the logits' normalised squared error to stock's is {error}")
    if q.method != "none":
        must(stats.pages_read == 4 * n_heads and stats.pages_total == n // page * n_heads,
             f"{stats.pages_read} of {stats.pages_total} pages were read, not {4 * n_heads} of {n // page * n_heads}")
        must(np.isfinite(got["few"]).all(), "NaN or infinite logits where pages are selected")


def _run(model: str, s: Setting, n_gen: list[int], n_prompt: list[int], trace: bool = False) -> dict[str, Any]:
    """One run: warm up, fill the context, decode, read prompts."""
    meter = DeviceMeter()
    with meter.sampling():
        result = _tests(model, s, n_gen, n_prompt, meter if trace else None)
    return result | {"peak_device_bytes": meter.peak, "device_source": meter.source}


def _tests(model: str, s: Setting, n_gen: list[int], n_prompt: list[int], traced: DeviceMeter | None) -> dict[str, Any]:
    tests = [(f"tg{n}", s.tokens(n, False), 1) for n in n_gen] + [(f"pp{n}", s.tokens(n, True), n) for n in n_prompt]
    behind = [n for _, n, _ in tests] or [1]
    n_ctx = s.depth + (sum(behind) if s.evicts else max(behind))

    result: dict[str, Any] = {"test_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}
    with _open(model, s, n_ctx, s.eviction, s.selection) as session:
        sequence = _Sequence(session, s, _tokens(session, n_ctx))
        sequence.measure("", min(64, n_ctx), s.n_ubatch)
        sequence.clear()
        sequence.measure("", min(4, n_ctx), 1)
        sequence.clear()
        if traced:
            sequence.trace = Trace(traced)
            sequence.trace.sample("start", 0, 0)

        done = []
        at_depth = "" if s.depth == 0 else f" @ d{s.depth}"
        if s.copies:
            sequence.measure("", s.copies, s.n_ubatch)
            sequence.fill(s.depth)
        elif s.depth:
            done.append(sequence.measure("prompt" + at_depth, s.depth, s.n_ubatch))
        for name, n, batch in tests:
            if not s.evicts and sequence.pos != s.depth:
                sequence.go_back(s.depth)
            done.append(sequence.measure(name + at_depth, n, batch))

        stats, layers = session.stats(), session.layers()
        result |= {
            "dense_share": statistics.fmean(layer.il < s.selection.dense_layers for layer in layers),
            "summary_bytes": stats.summary_bytes,
            "tests": done,
            "cells_allocated": stats.cells_allocated,
            "k_bytes": stats.k_bytes,
            "v_bytes": stats.v_bytes,
            "kv_bytes": stats.kv_bytes,
            "scratch_bytes": stats.scratch_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "trace": sequence.trace.rows() if traced else None,
            "cpu_variant": native.cpu_variant(),
            "backend": _backends(s),
            "model_size": llama_cpp.llama_model_size(session.model),
            "model_n_params": llama_cpp.llama_model_n_params(session.model),
        }
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(session.model, text, len(text))
        result["model_type"] = text.value.decode(errors="replace")
    return result


class _Sequence:
    """One sequence of tokens through a session, timed, and beside it what the rule of eviction makes of it."""

    def __init__(self, session: Session, setting: Setting, tokens: np.ndarray):
        self.session, self.setting = session, setting
        self.tokens = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        self.pos = self.used = self.n_evictions = 0
        self.trace: Trace | None = None

    def clear(self) -> None:
        self.session.clear()
        # whether clearing takes the count of evictions back does not matter here
        self.pos, self.used, self.n_evictions = 0, 0, self.session.stats(0).n_evictions

    def go_back(self, depth: int) -> None:
        """Make the context ``depth`` tokens long again, exactly as it was."""
        if depth and self.used == self.pos and self.session.remove(depth):
            self.pos = self.used = depth
            return
        # evicted tokens do not come back, and some caches cannot remove a tail
        self.clear()
        copies = self.setting.copies
        if depth:
            self.measure("", copies or depth, self.setting.n_ubatch)
        if copies:
            self.fill(depth)

    def fill(self, depth: int) -> None:
        """Make the context ``depth`` tokens long with copies of the cells that it has."""
        try:
            fill_with_copies(self.session, depth)
        except EdgekvError as error:
            raise EdgekvError(f"--fill copies ({self.setting}): {error}") from None
        self.pos = self.used = depth
        self._verify("copies", self.session.stats(0))

    def measure(self, name: str, n: int, batch: int) -> dict[str, Any]:
        """Decode ``n`` tokens as prompts of ``batch`` tokens, each in ubatches; 1 is decoding token by token.

        Raises:
            EdgekvError: llama_decode failed, or the cache is not what it must be.
        """
        ctx, before = self.session.ctx, self.session.stats(0)
        first, cells, start_pos = self.n_evictions, 0, self.pos
        # looked up before the clock runs
        batch_of, decode = llama_cpp.llama_batch_get_one, llama_cpp.llama_decode
        synchronize, token = llama_cpp.llama_synchronize, llama_cpp.llama_token
        sizes = [m for part in _split(n, batch) for m in _split(part, self.setting.n_ubatch)]
        native.clear_error()
        synchronize(ctx)

        start = time.perf_counter()
        for m in sizes:
            code = decode(ctx, batch_of((token * m).from_buffer(self.tokens, 4 * self.pos), m))
            if code != 0:
                raise EdgekvError(f"{native.last_error() or f'llama_decode returned {code}'} ({self.setting})")
            if batch == 1:
                synchronize(ctx)  # one token waits for the one before
            self._count(m)
            cells += m * self.used
            if self.trace and (batch > 1 or (self.pos - start_pos) % TRACE_EVERY == 0):
                synchronize(ctx)
                self.trace.sample((name or "fill").split()[0], self.pos, self.used)
        synchronize(ctx)
        seconds = time.perf_counter() - start

        after = self.session.stats(0)
        self._verify(name, after)
        return {
            "test": name,
            "n_tokens": n,
            "seconds": seconds,
            "evict_us": after.evict_us - before.evict_us,
            "n_evictions": self.n_evictions - first,
            "cells_used": after.cells_used,
            "cells_mean": cells / n,
            **{name: getattr(after, name) - getattr(before, name) for name in (*_COUNTS, *(f"{t}_us" for t in _TIMES))},
        }

    def _count(self, n: int) -> None:
        """The rule: evict before a ubatch that would exceed ``budget + n_ubatch`` cells."""
        e = self.setting.eviction
        if e.policy != "none" and self.used + n > e.budget + self.setting.n_ubatch:
            self.used = e.budget
            self.n_evictions += 1
        self.used += n
        self.pos += n

    def _verify(self, name: str, stats: native.CacheStats) -> None:
        got = (stats.cells_used, stats.n_evictions, stats.tokens_seen)
        if got != (self.used, self.n_evictions, self.pos):
            raise EdgekvError(
                f"check failed ({self.setting}{', ' + name if name else ''}): {got[0]} cells, {got[1]} evictions and "
                f"{got[2]} tokens, but there must be {self.used}, {self.n_evictions} and {self.pos}"
            )
        n_vocab = self.session.n_vocab
        last = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.session.ctx, -1), shape=(n_vocab,))
        if not np.isfinite(last).all():
            raise EdgekvError(f"check failed ({self.setting}, {name}): NaN or infinite logits")


def _split(n: int, size: int) -> list[int]:
    """``n`` in parts of ``size``; the last one may be smaller."""
    return [min(size, n - i) for i in range(0, n, size)]


def _tokens(session: Session, n: int) -> np.ndarray:
    """``n`` random ordinary tokens, always the same ones for a vocabulary."""
    rng = np.random.default_rng(0)
    pool = rng.permutation(session.n_vocab)[:4096].tolist()
    if llama_cpp.llama_vocab_type(session.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        vocab = session.vocab
        ordinary = [t for t in pool if not llama_cpp.llama_vocab_is_control(vocab, t)
                    and not llama_cpp.llama_vocab_is_eog(vocab, t)]
        pool = ordinary or pool
    return rng.choice(pool, n)


def _backends(s: Setting) -> str:
    """The backends beside the CPU, as llama-bench names them; ``CPU`` if there is none."""
    ggml = _runtime.Ggml()
    names = map(ggml.registry_name, ggml.registries())
    return ",".join(name for name in names if name != "CPU" and (name != "RPC" or s.rpc)) or "CPU"
