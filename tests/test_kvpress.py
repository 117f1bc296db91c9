"""Our runtime against kvpress: the same model, text, filters and ratio through the published library.

kvpress computes with the de-quantised weights in float32. On the same weights as an F32 file the runtime agrees with it
closely; on the Q4_1 file, whose kernels quantise activations, the loss is off by more than 0.015 for some runs. The F32
cache goes without flash attention: with it llama.cpp casts the cache to F16 before attention.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import oracle_snapkv
from edgekv import filters as filters_of, hf, published
from edgekv.calibrate import default_text
from edgekv.gguf_file import GGUF
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from test_filters import REFERENCE

pytestmark = pytest.mark.slow

BRIDGE = Path(__file__).with_name("kvpress_bridge.py")
PYTHON = "EDGEKV_KVPRESS_PYTHON"
N_CONTEXT, N_REST = 1024, 128
RATIOS = (0.5, 0.75, 0.875)
# sinks, window
PROTECTED = {"qfilters": (0, 0), "knorm": (0, 0), "keydiff": (0, 0), "streaming": (4, 0), "snapkv": (0, 64)}
RUNS = [(policy, ratio) for policy in PROTECTED for ratio in RATIOS]

# file, cache type, flash attention; tolerance of the loss; agreement of kept sets, on average and in the worst head
CASES = {
    "F32, F32 cache": ("f32", "f32", False, 0.001, 0.9995, 0.98),
    "F32, F16 cache": ("f32", "f16", False, 0.003, 0.998, 0.97),
    "F32, F16 cache, fa": ("f32", "f16", True, 0.003, 0.998, 0.97),
    "Q4_1, F16 cache, fa": ("q4_1", "f16", True, 0.03, 0.95, 0.85),
}


@pytest.fixture(scope="module")
def bridge():
    """Asks kvpress, in an interpreter that has it."""
    python = os.environ.get(PYTHON) or sys.executable
    found = subprocess.run([python, "-c", "import kvpress"], capture_output=True, text=True)
    if found.returncode:
        why = f"{python} cannot import kvpress; pip install '.[kvpress]' somewhere and name its interpreter in {PYTHON}"
        (pytest.fail if PYTHON in os.environ else pytest.skip)(why)

    def ask(**request):
        done = subprocess.run([python, BRIDGE], input=json.dumps(request), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture(scope="module")
def text(smollm2):
    """Token ids of prose that is nobody's reference, from the middle of the default text."""
    with Session(smollm2, n_ctx=64) as session:
        tokens = session.tokenize(default_text(), special=False)
    start = len(tokens) // 2
    return tokens[start : start + N_CONTEXT + N_REST]


@pytest.fixture(scope="module")
def filters(smollm2_qfilters):
    return filters_of.read(GGUF(smollm2_qfilters))


@pytest.fixture(scope="module")
def files(smollm2, smollm2_checkpoint, tmp_path_factory):
    """The model's file, and its de-quantised weights as another: half a GiB for as long as it is needed."""
    path = tmp_path_factory.mktemp("f32") / "smollm2-f32.gguf"
    hf.to_gguf(smollm2_checkpoint, path, "f32")
    yield {"q4_1": smollm2, "f32": path}
    path.unlink()


@pytest.fixture(scope="module")
def theirs(bridge, smollm2, smollm2_checkpoint, filters, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("kvpress") / "q_filters.safetensors"
    published.save(path, filters, GGUF(smollm2))
    answers = bridge(model=str(smollm2_checkpoint), context=text[:N_CONTEXT], continuation=text[N_CONTEXT:],
                     filters=str(path), runs=RUNS)
    return dict(zip(RUNS, answers))


def nll_mean(session, rest, seq_id: int) -> float:
    logits = session.decode(rest, N_CONTEXT, seq_id, logits="all").astype(np.float64)[:-1]
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((log_sum - logits[np.arange(len(rest) - 1), rest[1:]]).mean())


def compare(path, text, filters, wanted, kind: str, flash_attn: bool):
    """Every one of RUNS on copies of one context: the run, our loss less theirs, and the shares of their positions that
    we keep too ``[layers, KV heads]``, None where ``wanted`` has no positions."""
    rest = np.array(text[N_CONTEXT:])
    # any settings in mode prompt with the queries of the window at hand: each copy is evicted from by its own
    settings = EvictionSettings("snapkv", 128, 64, 0, "prompt")
    with Session(path, n_ctx=N_CONTEXT + 2 * N_REST, n_batch=N_CONTEXT, n_seq_max=2, flash_attn=flash_attn, type_k=kind,
                 type_v=kind, settings=settings) as session:
        session.decode(text[:N_CONTEXT], 0)
        for policy, ratio in RUNS:
            want, (keep, window) = wanted[policy, ratio], PROTECTED[policy]
            budget = int(N_CONTEXT * (1 - ratio))
            session.copy(0, 1)
            gone = session.evict_as(EvictionSettings(policy, budget, window, keep, "prompt"),
                                    filters if policy == "qfilters" else None, 1)
            assert gone == N_CONTEXT - budget
            shared = None
            if np.ndim(want["kept"]):
                shared = np.array([[np.isin(kept, session.positions(il, head, 1)).mean()
                                    for head, kept in enumerate(heads)] for il, heads in enumerate(want["kept"])])
            loss = nll_mean(session, rest, 1)
            assert session.remove(0, -1, 1)
            shown = "" if shared is None else f", kept sets agree to {shared.mean():.4f}, worst head {shared.min():.4f}"
            print(f"{policy} @ {ratio}: nll {loss:.4f}, kvpress {want['nll_mean']:.4f}, "
                  f"difference {loss - want['nll_mean']:+.4f}{shown}")
            yield (policy, ratio), loss - want["nll_mean"], shared


@pytest.mark.parametrize("case", CASES)
def test_agreement(theirs, files, filters, text, case):
    name, kind, flash_attn, tolerance, on_average, worst = CASES[case]
    found = list(compare(files[name], text, filters, theirs, kind, flash_attn))
    assert len(found) == len(RUNS)
    assert not [run for run, off, shared in found
                if abs(off) > tolerance or shared.mean() < on_average or shared.min() < worst]


@pytest.fixture(scope="module")
def reference():
    """The reference's numbers, and its filters in the published form."""
    if not (REFERENCE / "smollm2-135m.json").exists():
        pytest.skip("the reference folder is not here")
    numbers, arrays = json.loads((REFERENCE / "smollm2-135m.json").read_text()), np.load(REFERENCE / "smollm2-135m.npz")
    wanted = {(policy, ratio): dict(numbers["policies"][f"{'qfilter' if policy == 'qfilters' else policy}@{ratio}"])
              for policy, ratio in RUNS}
    for ratio in RATIOS:
        wanted["qfilters", ratio]["kept"] = arrays[f"kept_qfilter_{ratio}"]
    return numbers["tokens"], wanted, arrays["q_filters_kvpress"]


@pytest.mark.parametrize("kind, flash_attn, tolerance",
                         (("f32", False, 0.001), ("f16", False, 0.003), ("f16", True, 0.003)))
def test_reference_text(reference, files, tmp_path, kind, flash_attn, tolerance):
    """The numbers that were handed in, without kvpress at hand: far inside the 0.015 that were asked for."""
    tokens, wanted, stored = reference
    save_file({"q_filters": stored}, tmp_path / "q_filters.safetensors")
    imported = published.load(tmp_path / "q_filters.safetensors", GGUF(files["f32"]))
    found = list(compare(files["f32"], tokens, imported, wanted, kind, flash_attn))
    assert len(found) == len(RUNS)
    assert not [run for run, off, shared in found
                if abs(off) > tolerance or shared is not None and (shared.mean() < 0.998 or shared.min() < 0.97)]


def test_the_bridge_gives_the_reference_numbers(bridge, reference, smollm2_checkpoint, tmp_path):
    """The bridge means what the reference's author meant."""
    tokens, wanted, stored = reference
    save_file({"q_filters": stored}, tmp_path / "q_filters.safetensors")
    answers = bridge(model=str(smollm2_checkpoint), context=tokens[:N_CONTEXT], continuation=tokens[N_CONTEXT:],
                     filters=str(tmp_path / "q_filters.safetensors"), runs=RUNS)
    assert len(answers) == len(RUNS)
    for run, found in zip(RUNS, answers):
        want = wanted[run]
        assert abs(found["nll_mean"] - want["nll_mean"]) < 1e-3
        assert found["top1"][:8] == want["top1_first8"]
        if np.ndim(want["kept"]):
            same = [np.isin(kept, found["kept"][il][h]).mean() for il, heads in enumerate(want["kept"])
                    for h, kept in enumerate(heads)]
            assert np.mean(same) > 0.999


def test_snapkv_oracle(bridge):
    """Our float64 SnapKV, on queries and keys that a random model's attention was given, scores as kvpress does."""
    window = 64
    for layer in (layer for layers in bridge(tiny=[65, 66, 69, 200]) for layer in layers):
        queries, keys, want = (np.array(layer[name]) for name in ("queries", "keys", "scores"))
        found = oracle_snapkv.scores(queries[:, -window:], keys)
        np.testing.assert_allclose(found, want[:, :-window], rtol=2e-5, atol=1e-9)
        assert (want[:, -window:] > want[:, :-window].max()).all()
