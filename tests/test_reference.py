"""Parity with an independent library in prompt mode, on a real model: which keys stay, and what that costs.

The reference computes in float32, llama.cpp quantises activations on the way: near-agreement is what can be expected,
and an error of sign, permutation or position shows as gross disagreement.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekv import filters
from edgekv.gguf_file import GGUF
from edgekv.published import load
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from test_filters import REFERENCE

import llama_cpp

pytestmark = pytest.mark.skipif(not (REFERENCE / "smollm2-135m.json").exists(), reason="the reference folder is not here")

N_CONTEXT = 1024
RATIOS = (0.5, 0.75, 0.875)
POLICIES = {"qfilters": ("qfilter", 0, 0.015), "knorm": ("knorm", 0, 0.03), "keydiff": ("keydiff", 0, 0.03),
            "streaming": ("streaming", 4, 0.03)}  # name in the reference, sinks, tolerance of the loss


@pytest.fixture(scope="module")
def reference():
    return json.loads((REFERENCE / "smollm2-135m.json").read_text())


@pytest.fixture(scope="module")
def published():
    return np.load(REFERENCE / "smollm2-135m.npz")


@pytest.fixture(scope="module")
def imported(smollm2, published, tmp_path_factory):
    """The reference's filters, through the file form in which such filters are published."""
    path = tmp_path_factory.mktemp("reference") / "q_filters.safetensors"
    save_file({"q_filters": published["q_filters_kvpress"]}, path)
    return load(path, GGUF(smollm2))


def after_evictions(path, text, policy, keep, budgets, flash_attn, flat):
    """A session whose sequences have read the context as one exact prompt and were evicted once, each to its budget."""
    session = Session(path, n_ctx=1280, n_ubatch=512, n_batch=1024, n_seq_max=len(budgets), flash_attn=flash_attn,
                      filters=flat, settings=EvictionSettings(policy, min(budgets), 0, keep, "prompt"))
    session.decode(text[:N_CONTEXT], 0)
    for seq_id in range(1, len(budgets)):
        llama_cpp.llama_memory_seq_cp(session.memory, 0, seq_id, -1, -1)
    for seq_id, budget in enumerate(budgets):
        assert session.evict(seq_id, budget) == N_CONTEXT - budget
    return session


def nll_mean(session, text, seq_id: int) -> float:
    """Mean negative log-likelihood of the continuation's tokens from the second on, at their true positions."""
    rest = np.array(text[N_CONTEXT:])
    logits = session.decode(rest, N_CONTEXT, seq_id, logits="all").astype(np.float64)[:-1]
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((log_sum - logits[np.arange(len(rest) - 1), rest[1:]]).mean())


@pytest.mark.parametrize("flash_attn", (False, True), ids=("fa off", "fa on"))
@pytest.mark.parametrize("policy", POLICIES)
def test_parity(smollm2, reference, published, imported, policy, flash_attn):
    name, keep, tolerance = POLICIES[policy]
    text = reference["tokens"]
    wanted = [reference["policies"][f"{name}@{ratio}"] for ratio in RATIOS]
    flat = imported if policy == "qfilters" else None
    with after_evictions(smollm2, text, policy, keep, [w["kept"] for w in wanted], flash_attn, flat) as session:
        for seq_id, (ratio, want) in enumerate(zip(RATIOS, wanted)):
            agreement = None
            if policy == "qfilters":
                kept = published[f"kept_qfilter_{ratio}"]
                agreement = np.array([[len(np.intersect1d(session.positions(il, h, seq_id), kept[il, h])) / kept.shape[2]
                                       for h in range(kept.shape[1])] for il in range(kept.shape[0])])
            loss = nll_mean(session, text, seq_id)
            shown = "" if agreement is None else (f", kept sets agree to {agreement.mean():.4f}, "
                                                  f"worst head {agreement.min():.4f}")
            print(f"{policy} @ {ratio}: nll {loss:.4f}, reference {want['nll_mean']:.4f}, "
                  f"difference {loss - want['nll_mean']:+.4f}{shown}")
            assert abs(loss - want["nll_mean"]) <= tolerance
            if agreement is not None and ratio == 0.75:
                assert agreement.mean() >= 0.985 and agreement.min() >= 0.95


def test_the_measure_sees_a_wrong_sign(smollm2, reference, published, imported):
    """Keeping the lowest scores instead must not pass for parity."""
    want, kept = reference["policies"]["qfilter@0.75"], published["kept_qfilter_0.75"]
    lowest = filters.QFilters([-v for v in imported.vectors], imported.layers)
    with after_evictions(smollm2, reference["tokens"], "qfilters", 0, [want["kept"]], True, lowest) as session:
        agreement = [len(np.intersect1d(session.positions(il, h), kept[il, h])) / kept.shape[2]
                     for il in range(kept.shape[0]) for h in range(kept.shape[1])]
        difference = nll_mean(session, reference["tokens"], 0) - want["nll_mean"]
    print(f"negated filters: difference {difference:+.4f}, kept sets agree to {np.mean(agreement):.4f}")
    assert np.mean(agreement) < 0.1 and difference > 3 * POLICIES["qfilters"][2]
