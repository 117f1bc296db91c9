"""SIGKILL while files are written: nothing damaged under the final name, an older file there stays whole, the second run
succeeds. What a killed process leaves are hidden temporaries beside the file, which nothing reads.

First at every single step that the library takes on the disk, then from outside, in the command line's real work, as soon
as the temporary has grown so far or at any time.
"""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest

from edgekv import atomic
from edgekv.convert import convert, save_filters
from edgekv.errors import EdgekvError
from edgekv.filters import read
from edgekv.gguf_file import GGUF
from edgekv.session_file import SavedSession
from process import EDGEKV, python
from test_filters import random_filters
from test_split import split_model
from tinymodel import write_tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")

LEFT = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)")


def left(folder, names):
    """What lies in a folder besides these files; all of it has to be temporaries of theirs."""
    found = set(os.listdir(folder)) - set(names)
    for name in found:
        match = LEFT.fullmatch(name)
        assert match and match[1] in names, f"{name} is left in the folder"
        assert not name.endswith((".gguf", ".safetensors", ".session"))
    return found


# --- at every step ---------------------------------------------------------------------------------------------------


class File:
    """An open file that is written to in halves."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.step()
        self.file.write(data[half:])

    def __getattr__(self, name):
        return getattr(self.file, name)


def killed_at_step(n, work):
    """Do the work in a process of its own, which is killed at its n-th step (0: none): before and after a file is made, in
    the middle of each write, around each fsync, chmod, rename and removal. Whether it came to its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        return status == 0
    try:
        done = itertools.count(1)

        def step():
            if next(done) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def around(call):
            def wrapped(*args, **kwargs):
                step()
                result = call(*args, **kwargs)
                step()
                return result
            return wrapped

        make = around(open)
        atomic.open = lambda *args, **kwargs: File(make(*args, **kwargs), step)
        for name in ("fsync", "chmod", "replace", "unlink"):
            setattr(os, name, around(getattr(os, name)))
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def killed_at_every_step(work, check):
    """Do the work with a kill at its first, second, ... step, until it comes to its end; ``check(ended)`` looks at what is
    there after each. Returns the number of steps."""
    for n in itertools.count(1):
        ended = killed_at_step(n, work)
        check(ended)
        if ended:
            return n - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", n_layer=1, n_embd=8, n_head=2, n_head_kv=1,
                            head_size=8, n_ff=8, n_vocab=8, tokenizer="none")


@pytest.mark.parametrize("what", ["convert", "calibrate", "session"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_every_step_of_one_file(model, tmp_path, what, older):
    filters = random_filters(GGUF(model))
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "file"
    saved = SavedSession(np.arange(9, dtype=np.int32), np.arange(99).astype(np.uint8),
                         [{"role": "user", "content": "x"}], "0")
    work = {"convert": lambda path: convert(model, path, filters),
            "calibrate": lambda path: save_filters(path, GGUF(model), filters),
            "session": lambda path: saved.write(path)}[what]
    work(tmp_path / "expected")
    new, old = (tmp_path / "expected").read_bytes(), b"an older file" if older else None
    seen = set()

    def reset():
        if old is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(old)

    def check(ended):
        now = path.read_bytes() if path.exists() else None
        if what == "session" and now not in (None, old):  # its metadata comes in any order
            assert SavedSession.read(path).state.tolist() == list(range(99))
            now = new
        assert now in (old, new) and (not ended or now == new)
        seen.add(now)
        left(folder, ["file"])
        reset()

    reset()
    assert killed_at_every_step(lambda: work(path), check) >= 6
    assert seen == {old, new}


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_every_step_of_a_split_model(model, tmp_path, older):
    """Old and new parts are never read together; where the first is not there, nothing is read."""
    (tmp_path / "in").mkdir()
    source = split_model(model, tmp_path / "in" / "m.gguf")[0]
    filters = random_filters(GGUF(source))
    folder = tmp_path / "out"
    folder.mkdir()
    count = len(GGUF(source).parts)
    first = folder / f"n-00001-of-{count:05}.gguf"
    names = [f"n-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]

    def work():
        convert(source, first, filters)

    def reset():
        for name in os.listdir(folder):
            os.unlink(folder / name)
        if older:
            other = random_filters(GGUF(source), seed=1)
            convert(source, first, other)

    reset()
    old = read(GGUF(first)).flat().tolist() if older else None
    seen = []

    def check(ended):
        try:
            now = read(GGUF(first)).flat().tolist()
        except EdgekvError:
            assert not first.exists(), "a first part whose other parts are not there"
            now = None
        assert now in (None, old, filters.flat().tolist()) and (not ended or now == filters.flat().tolist())
        seen.append(now)
        left(folder, names)
        work()  # on top of what the kill has left
        assert read(GGUF(first)).flat().tolist() == filters.flat().tolist()
        reset()

    assert killed_at_every_step(work, check) >= 12
    assert old in seen and filters.flat().tolist() in seen


# --- in the real work ------------------------------------------------------------------------------------------------


def killed(command, moment):
    """Run, and kill when ``moment(seconds)`` is true. Whether it came to its end before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    begin = time.monotonic()
    while process.poll() is None and not moment(time.monotonic() - begin):
        assert time.monotonic() - begin < 600, "neither the moment nor the end comes"
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: whatever it has started too
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode == 0


def is_written(folder, size):
    """A moment: some temporary in the folder, none that an earlier run has left, has so many bytes."""
    def begin():
        had = set(os.listdir(folder))

        def moment(_seconds):
            for entry in os.scandir(folder):
                try:
                    if entry.name not in had and LEFT.fullmatch(entry.name) and entry.stat().st_size >= size:
                        return True
                except FileNotFoundError:
                    pass
            return False
        return moment
    return begin


def survives(command, path, moments, old=b"an older file"):
    """Kill a command at each of these moments: the file is the older one or the new one, and at last the new one. The
    number of runs that were killed, and of temporaries that they have left."""
    path.write_bytes(old)
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    lasts = time.monotonic() - begin
    new = path.read_bytes()
    assert new != old

    n = 0
    for moment in moments:
        path.write_bytes(old)
        when = moment() if callable(moment) else lambda seconds, at=moment * lasts: seconds >= at
        ended = killed(command, when)
        n += not ended
        now = path.read_bytes()
        assert now == new if ended else now in (old, new)
    found = left(path.parent, [path.name])

    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert path.read_bytes() == new
    assert left(path.parent, [path.name]) == found  # those of others are not touched: they may be at work
    return n, len(found)


def command(which, model, folder, filters, *more):
    words = {"convert": ("convert", model, "--with-qfilters", "--qfilters", filters),
             "calibrating": ("convert", model, "--with-qfilters", "-t", "1", *more),
             "calibrate": ("calibrate", model, "-t", "1", *more)}[which]
    return [*EDGEKV, *map(str, words), "-o", str(folder / "new.gguf")]


@pytest.mark.parametrize("which", ["convert", "calibrating", "calibrate"])
def test_the_command_line(tmp_path, which):
    # large enough for a kill in the middle of writing
    model = write_tiny_model(tmp_path / "m.gguf", n_layer=1, n_vocab=60_000 if which == "convert" else 320)
    save_filters(tmp_path / "filters.gguf", GGUF(model), random_filters(GGUF(model)))
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "text").write_text("The quick brown fox. " * 160)  # as short as a calibration allows
    size = model.stat().st_size if which == "convert" else 1
    rng = random.Random(0)
    # the last one is early, whatever else the machine does meanwhile
    moments = [is_written(folder, 0), rng.uniform(0.3, 1), 0.05]
    if which == "convert":
        moments += [is_written(tmp_path / "out", int(size * share)) for share in (0.3, 0.9)]
    words = command(which, model, folder, tmp_path / "filters.gguf", "--text", tmp_path / "text")
    n, n_left = survives(words, folder / "new.gguf", moments)
    print(f"\n{which}: killed {n} times, {n_left} temporaries left")
    assert n >= 1 and (which != "convert" or n_left)


@pytest.mark.parametrize("which", ["calibrating", "calibrate"])
def test_while_the_model_reads(tmp_path, which):
    """Killed at the third batch of the calibration: nothing is there yet, and what was there stays."""
    model = write_tiny_model(tmp_path / "m.gguf", n_layer=1)
    (tmp_path / "text").write_text("The quick brown fox. " * 160)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "new.gguf").write_bytes(b"an older file")
    words = command(which, model, folder, None, "--text", tmp_path / "text")[len(EDGEKV):]
    code = ("import os, signal\nfrom edgekv.session import Session\ndecode, n = Session.decode, []\n"
            "def killed(*args, **kwargs):\n    n.append(1)\n"
            "    if len(n) == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n    return decode(*args, **kwargs)\n"
            "Session.decode = killed\nfrom edgekv.cli import main\nmain()")
    run = subprocess.run([*python(code), *words], capture_output=True, timeout=600)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert os.listdir(folder) == ["new.gguf"] and (folder / "new.gguf").read_bytes() == b"an older file"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["convert", "calibrating", "calibrate"])
def test_a_real_model(smollm2, tmp_path, which):
    """94 MiB: the middle of writing is long."""
    from edgekv.calibrate import filters_for

    save_filters(tmp_path / "filters.gguf", GGUF(smollm2), filters_for(smollm2))
    folder = tmp_path / "out"
    folder.mkdir()
    moments = [is_written(folder, 0), 0.3, 0.7]
    if which == "convert":
        moments += [is_written(folder, int(smollm2.stat().st_size * share)) for share in (0.01, 0.25, 0.5, 0.75, 0.99)]
    n, n_left = survives(command(which, smollm2, folder, tmp_path / "filters.gguf"), folder / "new.gguf", moments)
    print(f"\n{which}: killed {n} times, {n_left} temporaries left")
    assert n >= (3 if which == "convert" else 1)
