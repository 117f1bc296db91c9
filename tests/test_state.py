"""The state of evicted contexts: what is refused, and that a refusal changes nothing.

That a restored state is the saved one, bit for bit, over random lives of two sequences, is in test_eviction.py.
"""

import ctypes
import functools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import native
from edgekv import session as session_module
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.settings import EvictionSettings
from test_eviction import contents, figures, tokens
from tinymodel import write_tiny_model

import llama_cpp  # last: edgekv says which library it loads

Session = functools.partial(session_module.Session, n_threads=1, n_ctx=512, n_ubatch=16, n_seq_max=2)
KNORM = EvictionSettings("knorm", 40, 10, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("state") / "tiny.gguf")


@pytest.fixture(scope="module")
def evicted(model):
    with Session(model, settings=KNORM) as s:
        s.read(tokens(200))
        s.read(tokens(50, 1), 0, 1)
        yield s


@pytest.fixture(scope="module")
def states(evicted):
    return {None: evicted.save(), 0: evicted.save(0)}


def everything(session):
    return [(contents(session, s), figures(session, s)) for s in range(2)]


def refused(session, state, seq_id, why):
    before = everything(session)
    with pytest.raises(EdgekvError, match=why) as error:
        session.load(state, seq_id)
    assert "\n" not in str(error.value)
    assert everything(session) == before


@pytest.mark.parametrize("seq_id", (None, 0))
def test_truncated(evicted, states, seq_id):
    state = states[seq_id]
    for n in {*range(0, 120), *range(len(state) - 20, len(state)), *range(0, len(state), 4999)}:
        refused(evicted, state[:n], seq_id, "truncated|damaged|not that of|another context|end of buffer")


@pytest.mark.parametrize("seq_id", (None, 0))
@settings(deadline=None, max_examples=200)
@given(at=st.floats(0, 1), bit=st.integers(0, 7), head=st.booleans())
def test_a_flipped_bit(evicted, states, seq_id, at, bit, head):
    """Anywhere, the head more often than its share."""
    state = bytearray(states[seq_id])
    place = int(at * ((3000 if head else len(state)) - 1))
    if seq_id is not None and 4 <= place < 8:
        return  # the number of the sequence it came from, which nobody reads
    state[place] ^= 1 << bit
    refused(evicted, bytes(state), seq_id, ".")


def checksum(data: bytes) -> bytes:
    """As ggml_ops/llama/edgekv-hash.h has it: anyone can make one."""
    h = 0
    for at in range(0, len(data), 8):
        word = data[at : at + 8]
        h = (h ^ int.from_bytes(word, "little") ^ len(word) << 59) * 0x9E3779B97F4A7C15 % 2**64
        h ^= h >> 29
    return h.to_bytes(8, "little")


def forged(state: bytes, **change: int) -> bytes:
    """With other numbers in the head, of the first sequence where they are a sequence's, and a checksum that matches."""
    begin = bytes(state).index(b"EdKv") + 16
    end = begin + int.from_bytes(state[begin - 8 : begin], "little")
    head = bytearray(state[begin:end])
    assert checksum(head) == bytes(state[end : end + 8])
    at = head.index(b"knorm") + 5 + 12
    for name, size in dict(n_payload=8, whole=1, n_sequences=4, n_used=4, n_keep=4, n_past=4, swa_head=8, floor=4,
                           n_evictions=8, n_moved=4, n_layers=4, stride=4).items():
        if name in change:
            head[at : at + size] = change[name].to_bytes(size, "little", signed=change[name] < 0)
        at += size
    return bytes(state[:begin]) + bytes(head) + checksum(head) + bytes(state[end + 8 :])


@pytest.mark.parametrize("change", [
    dict(floor=-1), dict(floor=201), dict(n_past=-5), dict(n_past=47), dict(n_moved=49), dict(n_moved=2**32 - 1),
    dict(n_layers=0), dict(n_layers=3), dict(stride=2**31), dict(n_payload=2**62), dict(n_payload=2**64 - 1),
    dict(n_keep=31), dict(n_keep=2**32 - 1),  # more than the budget has room for: an eviction could not be computed
])
def test_a_forged_head(evicted, states, change):
    """What a checksum does not keep out: numbers that do not go together."""
    for seq_id, state in states.items():
        refused(evicted, forged(state, **change), seq_id, "damaged|truncated")


@pytest.mark.parametrize("change", [dict(n_used=47), dict(n_past=199), dict(n_past=201)])
@pytest.mark.parametrize("whole", (True, False))
def test_a_head_that_is_not_its_cells(model, states, change, whole):
    """Seen only once they are in the cache: then it is empty."""
    seq_id = None if whole else 0
    with Session(model, settings=KNORM) as s:
        s.read(tokens(60))
        with pytest.raises(EdgekvError, match="were cleared: it has other tokens than it says"):
            s.load(forged(states[seq_id], **change), seq_id)
        assert s.stats(0).tokens_seen == 0
        s.read(tokens(100))


def with_position(state: bytes, cell: int, pos: int) -> bytes:
    """One cell of the first stream claims another position, with a checksum that matches."""
    begin = bytes(state).index(b"EdKv") + 16
    payload = begin + int.from_bytes(state[begin - 8 : begin], "little") + 8
    end = len(state) - 8
    # streams, cells of the first, then for each: position, number of sequences, sequence
    at = payload + 8 + 12 * cell
    assert checksum(state[payload:end]) == bytes(state[end:])
    changed = bytes(state[:at]) + pos.to_bytes(4, "little", signed=True) + bytes(state[at + 4 : end])
    return changed + checksum(changed[payload:])


@pytest.mark.parametrize("cell, pos", [(3, -5), (0, -(2**31)), (3, 160), (5, 0)])
@pytest.mark.parametrize("whole", (True, False))
def test_positions_that_make_no_sense(model, states, cell, pos, whole):
    """Cells claim the last positions in ascending order. What is loaded else cannot be removed, or not be saved again."""
    seq_id = None if whole else 0
    with Session(model, settings=KNORM) as s:
        s.read(tokens(60))
        with pytest.raises(EdgekvError, match="were cleared: the positions of its tokens make no sense"):
            s.load(with_position(states[seq_id], cell, pos), seq_id)
        assert s.stats(0).tokens_seen == 0 and s.stats(0).cells_used == 0
        s.load(states[seq_id], seq_id)  # nothing of it is in the way
        s.read(tokens(50), 200)


def test_a_forged_place_of_a_recurrent_half(tmp_path):
    """The state of an lfm2 sequence ends with its recurrent cell; one that claims no place of the sequence is refused, and
    what comes next is as in a fresh context."""
    path = write_tiny_model(tmp_path / "lfm2.gguf", arch="lfm2", n_layer=4, n_embd=128)
    with Session(path, settings=KNORM) as s, Session(path, settings=KNORM) as fresh:
        s.read(tokens(100))
        state = bytes(s.save(0))
        begin = state.index(b"EdKv") + 16
        end = begin + int.from_bytes(state[begin - 8 : begin], "little") + 8
        payload, place = state[end:-8], (99).to_bytes(4, "little") + bytes(4)  # and no list of sequences
        at = [i for i in range(len(payload)) if payload.startswith((1).to_bytes(4, "little") + place, i)]
        assert at, "the recurrent cell is not where it was"
        for other in (-7, 98, 100):
            wrong = bytearray(payload)
            wrong[at[-1] + 4 : at[-1] + 8] = other.to_bytes(4, "little", signed=True)
            with pytest.raises(EdgekvError, match="were cleared"):
                s.load(state[:end] + bytes(wrong) + checksum(wrong), 0)
            assert s.stats(0).tokens_seen == 0
            fresh.clear()
            assert np.array_equal(s.read(tokens(60)), fresh.read(tokens(60)))
            s.clear()
        more = bytearray(payload)
        more[at[-1] : at[-1] + 4] = (2).to_bytes(4, "little")  # cells; a sequence has one
        with pytest.raises(EdgekvError, match="were cleared"):
            s.load(state[:end] + bytes(more) + checksum(more), 0)


def test_moved_cells_that_are_not_there(model):
    with Session(model, settings=KNORM) as s:
        s.read(tokens(30))
        refused(s, forged(s.save(0), n_moved=20), 0, "damaged")


@pytest.mark.parametrize("change, why", [
    (dict(settings=EvictionSettings("knorm", 41, 10, 4)), "saved with budget 40, this context has 41"),
    (dict(settings=EvictionSettings("knorm", 40, 9, 4)), "saved with window 10, this context has 9"),
    (dict(settings=EvictionSettings("keydiff", 40, 10, 4)), "saved with policy knorm, this context has keydiff"),
    (dict(settings=EvictionSettings("knorm", 40, 10, 4, "prompt")), "saved with mode 0, this context has 1"),
    (dict(flash_attn=True), "types of K and V, or another setting of flash attention"),
    (dict(type_k="q8_0"), "types of K and V"),
    (dict(n_seq_max=3), "2 sequences, this context has 3"),
])
def test_other_settings(model, states, change, why):
    with Session(model, **{"settings": KNORM, **change}) as other:
        other.read(tokens(30), 0, 1)
        before = contents(other, 1)
        with pytest.raises(EdgekvError, match=why):
            other.load(states[None])
        assert contents(other, 1) == before


def test_a_smaller_context(model, states):
    with Session(model, settings=KNORM, n_ctx=256) as other, Session(model, settings=KNORM) as s:
        other.load(states[None])  # 200 tokens fit
        assert everything(other)[0][1] == (48, 200, 182, 10)
        s.read(tokens(300))
        with pytest.raises(EdgekvError, match="300 tokens, this context has room for 256"):
            other.load(s.save())


def test_other_filters(model):
    def filters(seed):
        rng = np.random.default_rng(seed)
        return QFilters([rng.standard_normal((2, 32)) for _ in range(2)], [0, 1])

    options = dict(settings=EvictionSettings("qfilters", 40, 10, 4))
    with Session(model, filters=filters(0), **options) as s, Session(model, filters=filters(0), **options) as same, \
            Session(model, filters=filters(1), **options) as other:
        s.read(tokens(200))
        same.load(s.save())
        assert everything(same) == everything(s)
        with pytest.raises(EdgekvError, match="other filters"):
            other.load(s.save())


def test_another_model(states, tmp_path):
    with Session(write_tiny_model(tmp_path / "other.gguf", n_vocab=330), settings=KNORM) as other:
        with pytest.raises(EdgekvError, match="another model"):
            other.load(states[None])


def test_stock_and_evicted_refuse_each_other(model, evicted, states):
    with Session(model) as stock:
        stock.read(tokens(30))
        before = everything(stock)
        for seq_id in (None, 0):
            refused(evicted, stock.save(seq_id), seq_id, "not that of a context with eviction")
            with pytest.raises(EdgekvError, match="of a context with eviction, this context has none"):
                stock.load(states[seq_id], seq_id)
            assert everything(stock) == before
        stock.load(stock.save())
        assert everything(stock) == before


@pytest.mark.parametrize("flags", (1, 2, 3))
def test_partial_and_device_states_are_refused(evicted, states, flags):
    """LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY and ..._ON_DEVICE."""
    before = everything(evicted)
    state = (ctypes.c_uint8 * len(states[0])).from_buffer_copy(states[0])
    native.clear_error()
    assert llama_cpp.llama_state_seq_get_size_ext(evicted.ctx, 0, flags) == 0
    assert "where eviction is on" in native.last_error()
    assert llama_cpp.llama_state_seq_get_data_ext(evicted.ctx, state, len(state), 0, flags) == 0
    if not flags & 2:
        assert llama_cpp.llama_state_seq_set_data_ext(evicted.ctx, state, len(state), 0, flags) == 0
    assert everything(evicted) == before


def test_what_a_later_decode_sees(model, states):
    """A restored context goes on as the saved one would have."""
    with Session(model, settings=KNORM) as one, Session(model, settings=KNORM) as two:
        one.read(tokens(200))
        two.load(one.save(0), 1)
        for pos in range(200, 300, 10):
            a, b = (s.decode(tokens(10, pos), pos, seq_id, logits="all") for s, seq_id in ((one, 0), (two, 1)))
            np.testing.assert_array_equal(a, b)
        assert contents(one, 0) == contents(two, 1)


# --- files -----------------------------------------------------------------------------------------------------------


def save_file(session, path, seq_id, ids=(1, 2, 3)):
    ids = (llama_cpp.llama_token * len(ids))(*ids)
    native.clear_error()
    if seq_id is None:
        return llama_cpp.llama_state_save_file(session.ctx, os.fsencode(path), ids, len(ids))
    return llama_cpp.llama_state_seq_save_file(session.ctx, os.fsencode(path), seq_id, ids, len(ids)) > 0


def load_file(session, path, seq_id):
    ids, n = (llama_cpp.llama_token * 8)(), ctypes.c_size_t()
    native.clear_error()
    if seq_id is None:
        ok = llama_cpp.llama_state_load_file(session.ctx, os.fsencode(path), ids, 8, ctypes.byref(n))
    else:
        ok = llama_cpp.llama_state_seq_load_file(session.ctx, os.fsencode(path), seq_id, ids, 8, ctypes.byref(n)) > 0
    return ok, ids[:n.value]


@pytest.mark.parametrize("seq_id", (None, 1))
def test_files(model, evicted, tmp_path, seq_id):
    path = tmp_path / "state"
    path.write_bytes(b"older")
    assert save_file(evicted, path, seq_id) and os.listdir(tmp_path) == ["state"]
    with Session(model, settings=KNORM) as s:
        assert load_file(s, path, seq_id) == (True, [1, 2, 3])
        assert contents(s, 1) == contents(evicted, 1)
        before = everything(s)
        data = path.read_bytes()
        path.write_bytes(data[:-100])
        assert not load_file(s, path, seq_id)[0]
        assert "truncated" in native.last_error() or "damaged" in native.last_error()
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        assert not load_file(s, path, seq_id)[0] and "damaged" in native.last_error()
        assert everything(s) == before


def test_a_file_that_cannot_be_written(evicted, tmp_path):
    assert not save_file(evicted, tmp_path / "none" / "state", None)
    (tmp_path / "folder").mkdir()
    assert not save_file(evicted, tmp_path / "folder", None)
    assert sorted(os.listdir(tmp_path)) == ["folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_leaves_the_older_file(evicted, tmp_path):
    """A file size limit stands in for a full disk: writes beyond it fail."""
    import resource
    import signal

    path = tmp_path / "state"
    path.write_bytes(b"older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        assert not save_file(evicted, path, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["state"]
