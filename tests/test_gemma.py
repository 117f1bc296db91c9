"""Gemma 3 270M, a sliding-window pair, at 8k tokens. Fetches the model (241 MiB, Gemma Terms of Use): run by
``tools/test -m gemma -s`` only, which prints the figures that are checked."""

import time

import numpy as np
import pytest

from edgekv.calibrate import calibrate
from edgekv.gguf_file import GGUF
from edgekv.quality import measure, stored
from edgekv.session import Session
from edgekv.settings import EvictionSettings

pytestmark = pytest.mark.gemma

N_CTX, N_UBATCH, BUDGET, WINDOW = 8192, 512, 1024, 256
N_SCORED = 1024  # the loss is that of the last tokens
FULL = [5, 11, 17]  # of 18 layers; the others have a window of 512 tokens
ROW = 1 * 256 * 2 * 2  # bytes of K and V of one cell in one layer: one KV head of 256 f16 each

# how much the loss may rise over the full cache's
BOUNDS = {"qfilters": 0.15, "streaming": 0.15}


@pytest.fixture(scope="module")
def model():
    from edgekv.pull import pull

    return pull("gemma3-270m")


@pytest.fixture(scope="module")
def filters(model):
    return calibrate(model)


@pytest.fixture(scope="module")
def prose():
    from pydoc_data.topics import topics

    # from the end, which calibration has seen least of
    return "\n\n".join(topics[name] for name in sorted(topics, reverse=True))


@pytest.fixture(scope="module")
def text(model, prose):
    with Session(model, n_ctx=256) as s:
        return s.tokenize(prose)[:N_CTX]


def loss_of(model, text, settings=None, filters=None) -> tuple[float, Session]:
    """Mean negative log-likelihood of the last tokens, read in the same batches whatever the settings."""
    session = Session(model, n_ctx=N_CTX, n_ubatch=N_UBATCH, flash_attn=True, settings=settings, filters=filters)
    began, total = time.perf_counter(), 0.0
    session.read(text[: N_CTX - N_SCORED])
    for pos in range(N_CTX - N_SCORED, N_CTX - 1, 128):
        targets = text[pos + 1 : pos + 129]
        logits = session.decode(text[pos : pos + len(targets)], pos, logits="all").astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[range(len(targets)), targets]).sum())
    print(f"  read in {time.perf_counter() - began:.0f} s, {session.stats()}")
    return total / (N_SCORED - 1), session


def test_filters_are_for_the_full_layers(model, filters):
    assert filters.layers == FULL and filters.head_size == [256] * 3 and filters.head_count_kv == [1] * 3
    filters.validate(GGUF(model))


def test_how_well_they_fit_a_model_with_qk_norm(model, filters, prose):
    """The report of the calibration, and the same measured on another text."""
    print()
    for what, found in (("stored by calibration", stored(filters)), ("4,096 tokens", measure(model, prose, filters=filters))):
        print(f"  {what}: rank correlation with attention {found.spearman.mean():.3f} (least {found.spearman.min():.3f}), "
              f"K-norm {found.spearman_knorm.mean():.3f}, {len(found.marked_heads())} heads marked")
        assert found.layers == FULL and found.spearman.min() > 0.2 and found.spearman.mean() > found.spearman_knorm.mean()
        assert found.marked_heads() == []
    report = stored(filters)
    print(f"  one-sided {report.one_sided.mean():.3f} (least {report.one_sided.min():.3f}), energy {report.energy.mean():.3f}")


def test_loss_and_memory_at_8k(model, text, filters):
    assert len(text) == N_CTX
    print()
    full, session = loss_of(model, text)
    with session:
        assert session.stats().kv_bytes == 18 * N_CTX * ROW  # the bindings' default: no window is bounded
    losses = {}
    for policy in BOUNDS:
        losses[policy], session = loss_of(model, text, EvictionSettings(policy, BUDGET, WINDOW, 4),
                                          filters if policy == "qfilters" else None)
        with session:
            stats = session.stats(0)
            assert [layer.il for layer in session.layers()] == FULL
            # full attention: pad(1024 + 512, 256) cells; sliding window: pad(512 + 512 + 256, 256)
            assert stats.kv_bytes == 3 * 1536 * ROW + 15 * 1280 * ROW
            assert stats.n_evictions > 10 and stats.cells_used <= BUDGET + N_UBATCH
            assert stats.tokens_seen == N_CTX - 1
            kept = session.positions(0, 0)
            assert list(kept[:4]) == [0, 1, 2, 3] and kept[-1] == N_CTX - 2
    for policy, loss in losses.items():
        print(f"  {policy}: loss {loss:.4f}, full cache {full:.4f}, difference {loss - full:+.4f} (bound {BOUNDS[policy]})")
    print(f"  KV cache: {18 * N_CTX * ROW:,} bytes whole, {(3 * 1536 + 15 * 1280) * ROW:,} evicted")
    for policy, bound in BOUNDS.items():
        assert losses[policy] - full < bound
