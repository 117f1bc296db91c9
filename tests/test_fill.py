"""``edgekv.fill``: contexts that are long because their cells are copies."""

import numpy as np
import pytest

from edgekv.errors import EdgekvError
from edgekv.fill import fill_with_copies
from edgekv.session import Session
from edgekv.settings import EvictionSettings, SelectionSettings
from tinymodel import write_tiny_model

TOKENS = [3 + 7 * i % 250 for i in range(50)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("fill") / "tiny.gguf")


@pytest.mark.parametrize("n", [1, 49, 50, 51, 100, 260])
@pytest.mark.parametrize("options", [{}, {"flash_attn": True}, {"flash_attn": True, "type_k": "q8_0", "type_v": "q4_0"},
                                     {"flash_attn": True, "selection": SelectionSettings(budget=32)}])
def test_cells_are_those_of_the_text_in_turn(model, options, n):
    with Session(model, n_ctx=300, n_threads=1, **options) as session:
        session.decode(TOKENS, 0)
        rows = [[session.rows(layer, head, values=values) for values in (False, True)] for layer in (0, 1) for head in (0, 1)]
        fill_with_copies(session, n)
        stats = session.stats(0)
        assert (stats.cells_used, stats.tokens_seen) == (n, n)
        for i, (layer, head) in enumerate(np.ndindex(2, 2)):
            assert session.positions(layer, head).tolist() == list(range(n))
            for values in (False, True):
                want = np.resize(rows[i][values], (n, rows[i][values].shape[1]))
                assert np.array_equal(session.rows(layer, head, values=values), want)
        assert np.isfinite(session.decode(TOKENS[:1], n, logits="last")).all()


def test_without_copies_nothing_changes(model):
    """A fill that is as long as the text leaves the model saying what it says."""
    got = []
    for fill in (False, True):
        with Session(model, n_ctx=300, n_threads=1) as session:
            session.decode(TOKENS, 0)
            if fill:
                fill_with_copies(session, len(TOKENS))
            got.append(session.decode([5], len(TOKENS), logits="last"))
    assert np.array_equal(*got)


@pytest.mark.parametrize(("arch", "options"), [
    ("gemma3", {}), ("llama", {"settings": EvictionSettings("streaming", 64, 16, 4)}),
])
def test_other_caches_are_refused(tmp_path, arch, options):
    path = write_tiny_model(tmp_path / "tiny.gguf", arch=arch)
    with Session(path, n_ctx=300, n_threads=1, **options) as session:
        with pytest.raises(EdgekvError, match="cannot be filled with copies") as error:
            session.decode(TOKENS[:40], 0)
            fill_with_copies(session, 100)
        assert "--fill read" in str(error.value)


def test_no_room_for_the_file(model, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Session(model, n_ctx=300, n_threads=1) as session:
        with pytest.raises(EdgekvError, match="no cell to copy"):
            fill_with_copies(session, 100)
        session.decode(TOKENS, 0)
        with monkeypatch.context() as m:
            m.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
            with pytest.raises(EdgekvError, match="TMPDIR"):
                fill_with_copies(session, 100)
        assert session.stats(0).cells_used == 50
    assert not list(tmp_path.iterdir())
