"""The log of an evaluation: it goes on after any kill with exactly what was whole, and refuses what is not its own."""

import errno
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekv
from edgekv.errors import EdgekvError
from edgekv.eval import journal as module
from edgekv.eval.journal import Journal, header
from process import python
from tinymodel import write_tiny_model

HEADER = {
    "edgekv_eval": 1, "kind": "niah", "config": {"lengths": [1024], "seeds": 3},
    "model": {"file": "m.gguf", "sha256": "ab" * 32, "size": 7, "architecture": "llama"},
    "versions": {"edgekv": "0.1.0", "llama_cpp_python": "0.3.36", "python": "3.11.7", "numpy": "2.0"},
    "machine": {"name": "a machine", "cores": 2, "threads": 2, "cpu_variant": "ggml-cpu-zen4"},
    "started": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def filled(path, n=3):
    with Journal.open(path, HEADER) as journal:
        for i in range(n):
            journal.add(f"case {i}", {"value": i / 7, "text": "é\n|"})
    return path.read_bytes()


def fails(why, path, changed=HEADER):
    before = path.read_bytes() if os.path.isfile(path) else None
    with pytest.raises(EdgekvError) as e:
        Journal.open(path, changed)
    said = str(e.value)
    assert why in said and str(path) in said and "\n" not in said, said
    assert before is None or path.read_bytes() == before
    return said


# --- the header ------------------------------------------------------------------------------------------------------


def test_header(tmp_path):
    model = write_tiny_model(tmp_path / "tiny.gguf", arch="gemma3")
    found = header("ppl", model, {"budgets": (256, 512)}, n_threads=7)
    assert list(found)[:2] == ["edgekv_eval", "kind"] and found["edgekv_eval"] == 1 and found["kind"] == "ppl"
    assert found["model"] == {"file": "tiny.gguf", "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
                              "size": model.stat().st_size, "architecture": "gemma3"}
    assert found["versions"] == {"edgekv": edgekv.__version__, "llama_cpp_python": "0.3.36",
                                 "python": platform.python_version(), "numpy": np.__version__}
    assert found["machine"]["threads"] == 7 and found["machine"]["cores"] == os.cpu_count()
    assert platform.system() in found["machine"]["name"] and found["machine"]["cpu_variant"]
    assert found["started"].endswith("+00:00")
    assert Journal.open(None, found).header["config"] == {"budgets": [256, 512]}
    with pytest.raises(EdgekvError, match="nope.gguf: no such file"):
        header("ppl", tmp_path / "nope.gguf", {})


# --- going on --------------------------------------------------------------------------------------------------------


def test_in_memory():
    with Journal.open(None, HEADER) as journal:
        assert journal.done == {} and journal.path is None
        journal.add("a", {"pair": (1, 2), "share": np.float64(0.1), "curve": np.arange(2)})
    assert journal.done == {"a": {"pair": [1, 2], "share": 0.1, "curve": [0, 1]}}


def test_file(path):
    with Journal.open(path, HEADER) as journal:
        assert path.read_text().splitlines() == [json.dumps(HEADER)]  # before any work
        for i in range(3):
            journal.add(f"case {i}", {"value": i / 7, "text": "é\n|"})
            lines = path.read_text().splitlines()  # on disk at once
            assert len(lines) == i + 2
            assert json.loads(lines[-1]) == {"key": f"case {i}", "value": i / 7, "text": "é\n|"}
    first = journal.done

    data = path.read_bytes()
    with Journal.open(path, HEADER) as journal:
        assert journal.done == first == {f"case {i}": {"value": i / 7, "text": "é\n|"} for i in range(3)}
        assert path.read_bytes() == data
        journal.add("case 3", {})
    assert path.read_bytes() == data + b'{"key": "case 3"}\n'
    with pytest.raises(ValueError, match="'case 3' is there already"):
        journal.add("case 3", {})
    with pytest.raises(ValueError, match="no key of its own"):
        journal.add("case 4", {"key": 1})


def test_cut_anywhere(path, monkeypatch):
    """Whatever byte a kill leaves as the last one: the whole lines are there, and the log goes on from them."""
    whole = filled(path)
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: None)  # it takes its time
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    sizes = {*range(0, len(whole), 9), *(end + i for end in ends for i in range(-3, 3))}
    for size in sorted(sizes & {*range(len(whole))}):
        path.write_bytes(whole[:size])
        with Journal.open(path, HEADER) as journal:
            n = sum(end <= size for end in ends) - 1  # cases
            assert list(journal.done) == [f"case {i}" for i in range(n)]
            assert path.read_bytes() == whole[:ends[max(n, 0)]]
            journal.add("new", {"x": 1})
        assert path.read_bytes() == whole[:ends[max(n, 0)]] + b'{"key": "new", "x": 1}\n'


@pytest.mark.parametrize("tail", [b"\0\0\0\0\n", b'{"key": "case 9", "va\n', b"\xff\xfe\n", b"12\n", b'{"value": 1}\n',
                                  b"\n", b'{"key": 3}\n', b"[" * 100_000 + b"\n"])
def test_last_line_that_is_no_record(path, tail):
    whole = filled(path)
    path.write_bytes(whole + tail)
    with Journal.open(path, HEADER) as journal:
        assert len(journal.done) == 3 and path.read_bytes() == whole
    # elsewhere it is damage
    path.write_bytes(whole + tail + b'{"key": "case 4"}\n')
    fails("line 5 is damaged", path)
    path.write_bytes(whole + tail + b'{"key": "ca')
    fails("line 5 is damaged", path)


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.dictionaries(
    st.text(max_size=3).filter(lambda name: name != "key"),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))), max_size=5))
def test_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("journal") / "log"
    with Journal.open(path, HEADER) as journal:
        for key, record in records.items():
            journal.add(key, record)
    with Journal.open(path, HEADER) as journal:
        assert journal.done == records


def test_kill_and_go_on(path):
    """Killed in the midst of writing, twice; then it is finished."""
    code = f"""
from edgekv.eval.journal import Journal
journal = Journal.open({str(path)!r}, {HEADER!r})
print(len(journal.done), flush=True)
i = len(journal.done)
while True:
    journal.add(f"case {{i}}", {{"value": i, "filler": "x" * 3000}})
    i += 1
"""
    before = 0
    for _ in range(2):
        worker = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
        assert int(worker.stdout.readline()) == before
        deadline = time.monotonic() + 20
        while path.read_bytes().count(b"\n") < before + 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        with Journal.open(path, HEADER) as journal:
            assert len(journal.done) >= before + 19
            assert [record["value"] for record in journal.done.values()] == list(range(len(journal.done)))
            before = len(journal.done)


def test_interrupted_in_the_midst(path, monkeypatch):
    """Ctrl-C between the write and the note of it: the case can be added again."""
    whole = filled(path, 1)
    with Journal.open(path, HEADER) as journal:
        def interrupted(descriptor):
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(module.os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.add("long", {"text": "x" * 100})
        assert "long" not in journal.done
        journal.add("short", {})
    assert path.read_bytes() == whole + b'{"key": "short"}\n'


# --- what belongs to another evaluation ------------------------------------------------------------------------------


def other(**changes):
    """The header with other values: section__name=value."""
    new = json.loads(json.dumps(HEADER))
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = new
        for section in sections:
            place = place[section]
        place[last] = value
    return new


@pytest.mark.parametrize(("changes", "why"), [
    ({"kind": "ruler"}, "another evaluation (niah, now ruler)"),
    ({"config__seeds": 4}, "begun with other seeds (3, now 4)"),
    ({"config__more": True}, "another more (nothing, now true)"),
    ({"config": {"lengths": [1024]}}, "begun with other seeds (3, now nothing)"),
    ({"model__sha256": "cd" * 32}, "another model (abab"),
    ({"versions__edgekv": "0.2.0"}, "another edgekv (0.1.0, now 0.2.0)"),
    ({"versions__llama_cpp_python": "0.4"}, "another llama-cpp-python (0.3.36, now 0.4)"),
    ({"machine__cpu_variant": "ggml-cpu-x64"}, "another CPU variant (ggml-cpu-zen4, now ggml-cpu-x64)"),
])
def test_another_evaluation(path, changes, why):
    filled(path)
    path.write_bytes(path.read_bytes() + b'{"cut')
    said = fails(why, path, other(**changes))  # and not even the cut line is touched
    assert "give another --log file or remove this one" in said


def test_what_may_differ(path):
    filled(path)
    new = other(started="2027", machine__threads=9, machine__name="x", machine__cores=4, versions__python="3.12",
                versions__numpy="3", model__file="renamed.gguf")
    with Journal.open(path, new) as journal:
        assert len(journal.done) == 3


def test_config_is_compared_as_json(path):
    Journal.open(path, other(config={"a": (1, 2), "b": 0.1, "1": None})).close()
    Journal.open(path, other(config={"1": None, "b": np.float64(0.1), "a": [1, 2]})).close()


# --- what is no log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"GGUF\x03\0\0\0", b"hello\nworld\n", b"{}\n", b"[1]\n", b'{"model": 1}\n{"a": 2}\n',
                                  b'{"started": 1, "edgekv_eval": 1}\n', b"\n"])
def test_no_log(path, data):
    path.write_bytes(data)
    fails("is no log of edgekv eval; give another --log file", path)


@pytest.mark.parametrize(("data", "why"), [
    (b'{"edgekv_eval": 1, "kin\n{"key": "a"}\n', "line 1 is damaged"),
    (b'{"edgekv_eval": "x"}\n', "line 1 is damaged"),
    (b'{"edgekv_eval": 2}\n', "is a log of another version of edgekv eval (2, not 1)"),
    (b'{"edgekv_eval": 1}\n', "another evaluation (nothing, now niah)"),
    (b'{"edgekv_eval": 1, "kind": "niah", "config": 3, "model": []}\n', "another model (nothing, now abab"),
])
def test_damaged_header(path, data, why):
    path.write_bytes(data)
    fails(why, path)


def test_key_twice(path):
    whole = filled(path)
    path.write_bytes(whole + b'{"key": "case 1"}\n{"key": "case 5"}\n')
    fails("line 5 has the key 'case 1' for the second time", path)


def test_places(tmp_path):
    fails("is a folder; name a file with --log", tmp_path)
    fails("there is no folder", tmp_path / "nowhere" / "log")
    (tmp_path / "file").write_text("")
    fails("there is no folder", tmp_path / "file" / "log")
    fails("is no regular file", type(tmp_path)("/dev/null"))
    os.mkfifo(tmp_path / "pipe")
    fails("is no regular file", tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    filled(tmp_path / "link")
    assert (tmp_path / "target").read_bytes().count(b"\n") == 4
    fails("cannot be used as a log: File name too long", tmp_path / ("x" * 300))


def test_no_permission(path, monkeypatch):
    """Root may write anything, so the system's answer is made up."""
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module.os, "open", refuse)
    fails("cannot be used as a log: Permission denied", path)


def test_one_process_at_a_time(path):
    filled(path)
    journal = Journal.open(path, HEADER)
    code = f"""
from edgekv.errors import EdgekvError
from edgekv.eval.journal import Journal
try:
    Journal.open({str(path)!r}, {HEADER!r})
except EdgekvError as e:
    print(e)
"""
    said = subprocess.run(python(code), capture_output=True, text=True).stdout
    assert said == f"{path}: another evaluation is writing to it; wait for it or give another --log file\n"
    fails("another evaluation is writing to it", path)
    journal.close()
    Journal.open(path, HEADER).close()


def test_a_log_that_failed_to_open_is_free_again(path):
    filled(path)
    fails("another evaluation (niah, now kl)", path, other(kind="kl"))
    Journal.open(path, HEADER).close()


def test_full_disk(path, monkeypatch):
    whole = filled(path, 1)
    with Journal.open(path, HEADER) as journal:
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr(module.os, "fsync", full)
            with pytest.raises(EdgekvError, match="the disk is full; free some space and start again"):
                journal.add("a", {})
        assert path.read_bytes() == whole and list(journal.done) == ["case 0"]
        journal.add("a", {})
    assert path.read_bytes() == whole + b'{"key": "a"}\n'

    new = path.with_name("new")
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(EdgekvError, match="new: the disk is full") as error:
        Journal.open(new, HEADER)
    monkeypatch.undo()
    Journal.open(new, HEADER).close()  # whoever holds the error does not hold the file
    assert error.value


def test_no_room_for_a_whole_line(path):
    """The system writes a part of the line: a limit of the file's size stands for a disk that fills up."""
    whole = filled(path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal.open(path, HEADER) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, hard))
        try:
            with pytest.raises(EdgekvError, match="log.jsonl: cannot be used as a log: File too large"):
                journal.add("long", {"text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
