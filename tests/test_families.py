"""Every family of attention: a tiny random checkpoint, converted, calibrated and evicted, against transformers.

What transformers computes (its own post-RoPE queries and keys, an SVD of them, the rule of evictions as a mask) is in
families.py. ``python tests/families.py --table`` prints what is measured here.
"""

import gc
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekv import calibrate_torch, native, published
from edgekv.calibrate import calibrate
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.rope_layout import permuted
from edgekv.settings import EvictionSettings
from families import BUDGET, FAMILIES, KEEP, N_UBATCH, WINDOW, Case, text

pytestmark = pytest.mark.slow

EVICTED = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]

SPEARMAN = 0.98  # with the other order of the channels, at best 0.9
ALIKE = 0.97  # share of the kept positions: experts chosen otherwise, for rounding, move a few
# of the loss, a mean over 256 tokens: what evictions may change, and how far the two sides may be apart
CHANGE, APART = 0.05, 0.001


@pytest.fixture(scope="module")
def begin(request, tmp_path_factory):
    """Name of a family -> its case, of which the conversion runs beside the tests of the one before."""
    import torch

    torch.set_num_threads(1)
    names = list(dict.fromkeys(item.callspec.params["case"] for item in request.session.items
                               if "case" in getattr(item, "fixturenames", ()) and item.path == request.path))
    started = {}

    def start(name):
        case = Case(FAMILIES[name], tmp_path_factory.mktemp(name))
        started[name] = pool.submit(case.convert)

    def get(name):
        for each in (name, *names[names.index(name) + 1 :][:1]):
            if each not in started:
                start(each)
        return started[name].result()

    with ThreadPoolExecutor(1) as pool:
        yield get
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def case(begin, request):
    yield begin(request.param)
    gc.collect()


evicted = pytest.mark.parametrize("case", EVICTED, indirect=True)


@evicted
def test_same_tokens(case):
    """The file's tokenizer gives the ids that the checkpoint's gives."""
    sample = text() + "Größe, naïve, 東京, 12345 'RE\t  \n\n  🙂 it's"
    if case.family.tokenizer.startswith("spm"):
        from sentencepiece import SentencePieceProcessor

        ids = SentencePieceProcessor(model_file=str(case.folder / "tokenizer.model")).encode(sample)
    else:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(case.folder / "tokenizer.json")).encode(sample, add_special_tokens=False).ids
    with case.session() as session:
        assert session.tokenize(sample)[len(session.tokenize("")) :] == ids


@evicted
def test_tokens_rank_alike(case):
    """The runtime's keys on our filters, transformers' keys on its own."""
    assert case.filters.layers == list(case.keys) == list(case.transformers) == list(case.family.layers)
    assert case.filters.n_queries >= 3000
    spearman = case.spearman(case.filters)
    assert min(spearman) >= SPEARMAN, spearman


@evicted
def test_published_filters(case, tmp_path):
    """Transformers' filters, negated, in its order of the channels. Nothing but the right order and sign will do."""
    rows = np.zeros((case.model.config.num_hidden_layers, *next(iter(case.transformers.values()))[0].shape), np.float32)
    for il, (vectors, _) in case.transformers.items():
        rows[il] = -vectors
    for sign, name in ((1, "published"), (-1, "wrong-sign")):
        save_file({"q_filters": sign * rows}, tmp_path / f"{name}.safetensors")
    gguf = GGUF(case.path)
    if case.family.unordered:
        with pytest.raises(EdgekvError, match=re.escape(case.family.unordered)):
            published.load(tmp_path / "published.safetensors", gguf)
        return

    filters = published.load(tmp_path / "published.safetensors", gguf)
    assert min(case.spearman(filters)) >= SPEARMAN
    assert max(case.spearman(published.load(tmp_path / "wrong-sign.safetensors", gguf))) <= -SPEARMAN

    d = rows.shape[-1]
    to_pairs = np.arange(d).reshape(2, d // 2).T.ravel()
    right, wrong = (to_pairs, np.arange(d)) if permuted(gguf.architecture) else (np.arange(d), to_pairs)
    for il, (_, keys) in case.transformers.items():
        # the median: where two experts are almost as good, the two sides may choose differently
        assert np.median(np.abs(case.keys[il] - keys[..., right])) <= 1e-3 * np.abs(keys).max()
    filters.vectors = [-rows[il][:, wrong] for il in filters.layers]
    assert max(case.spearman(filters)) < 0.9


@evicted
def test_calibrated_with_torch(case):
    def theirs():
        return calibrate_torch.calibrate(case.folder, case.path, text_files=[case.text_file], n_threads=1)

    if case.family.unordered:
        with pytest.raises(EdgekvError, match=re.escape(case.family.unordered)):
            theirs()
        return
    a, b = (np.concatenate([v / np.linalg.norm(v, axis=1, keepdims=True) for v in filters.vectors])
            for filters in (case.filters, theirs()))
    assert np.median((a * b).sum(axis=1)) >= 0.99


@evicted
def test_evicted(case):
    """The same tokens stay as in transformers, the loss is the same as there, and near that of the full cache."""
    full, found = case.full_losses, case.evicted
    assert abs(full[0] - full[1]) <= APART
    assert found.n_evictions == (len(case.tokens) - BUDGET) // N_UBATCH - 1
    assert found.layers == list(case.family.layers)
    assert found.alike >= ALIKE
    assert abs(found.loss - found.loss_transformers) <= APART
    assert abs(found.loss - full[0]) <= CHANGE


@pytest.mark.parametrize("case", REFUSED, indirect=True)
def test_refused(case):
    """In one line with the file's name and the reason."""
    message = f"{case.path}: eviction is not possible: {case.family.refused}"
    attempts = (lambda: native.cache_layers(case.path), lambda: calibrate(case.path),
                lambda: case.session(EvictionSettings("knorm", BUDGET, WINDOW, KEEP)))
    for attempt in attempts:
        with pytest.raises(EdgekvError) as error:
            attempt()
        assert str(error.value) == message
