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
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from test_filters import REFERENCE

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
    return filters.from_safetensors(path, GGUF(smollm2)).flat()


def after_eviction(path, text, policy, keep, budget, flash_attn, flat):
    """A session that has read the context as one exact prompt and then evicted once."""
    session = Session(path, n_ctx=1280, n_ubatch=512, n_batch=1024, flash_attn=flash_attn, filters=flat,
                      settings=EvictionSettings(policy, budget, 0, keep, "prompt"))
    session.decode(text[:N_CONTEXT], 0)
    assert session.evict() == N_CONTEXT - budget
    return session


def nll_mean(session, text) -> float:
    """Mean negative log-likelihood of the continuation's tokens from the second on, at their true positions."""
    rest = np.array(text[N_CONTEXT:])
    logits = session.decode(rest, N_CONTEXT, logits="all").astype(np.float64)[:-1]
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((log_sum - logits[np.arange(len(rest) - 1), rest[1:]]).mean())


@pytest.mark.parametrize("flash_attn", (False, True), ids=("fa off", "fa on"))
@pytest.mark.parametrize("policy", POLICIES)
def test_parity(smollm2, reference, published, imported, policy, flash_attn):
    name, keep, tolerance = POLICIES[policy]
    text = reference["tokens"]
    for ratio in RATIOS:
        want = reference["policies"][f"{name}@{ratio}"]
        flat = imported if policy == "qfilters" else None
        with after_eviction(smollm2, text, policy, keep, want["kept"], flash_attn, flat) as session:
            agreement = None
            if policy == "qfilters":
                kept = published[f"kept_qfilter_{ratio}"]
                agreement = np.array([[len(np.intersect1d(session.positions(il, h), kept[il, h])) / kept.shape[2]
                                       for h in range(kept.shape[1])] for il in range(kept.shape[0])])
            loss = nll_mean(session, text)
        shown = "" if agreement is None else f", kept sets agree to {agreement.mean():.4f}, worst head {agreement.min():.4f}"
        print(f"{policy} @ {ratio}: nll {loss:.4f}, reference {want['nll_mean']:.4f}, "
              f"difference {loss - want['nll_mean']:+.4f}{shown}")
        assert abs(loss - want["nll_mean"]) <= tolerance
        if agreement is not None and ratio == 0.75:
            assert agreement.mean() >= 0.985 and agreement.min() >= 0.95


def test_the_measure_sees_a_wrong_sign(smollm2, reference, imported):
    """Keeping the lowest scores instead must not pass for parity."""
    want = reference["policies"]["qfilter@0.75"]
    with after_eviction(smollm2, reference["tokens"], "qfilters", 0, want["kept"], True, -imported) as session:
        assert nll_mean(session, reference["tokens"]) - want["nll_mean"] > 0.5
