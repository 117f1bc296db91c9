"""The short version of tools/fuzz: the Python targets and the server, with mutations that a seed decides. What guided
fuzzing needs (atheris, clang) is not needed here. The native readers have tests/test_state.py and test_server_flags.py."""

import importlib.util
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from edgekv.errors import EdgekvError
from served import llama_server, served  # noqa: F401  the fixture
from tinymodel import write_tiny_model

FUZZ = Path(__file__).parent / "fuzz"
N = 1500


def module(name):
    """Of tests/fuzz, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FUZZ / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


targets = module("targets")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_only_errors_of_one_line(name, monkeypatch):
    """Nothing but refusals, no input of more than a second, no gigabyte."""
    resource = pytest.importorskip("resource", reason="no limits on this system")
    published = pytest.importorskip("edgekv.published")
    monkeypatch.setattr(published, "_shape", published._shape)  # the target replaces it
    folder = targets.work_folder(name)
    try:
        run, seeds = targets.TARGETS[name](folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        statm = Path("/proc/self/statm")
        if statm.exists():
            now = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + (512 << 20), hard))
        try:
            for i in range(-len(seeds), N):
                data = seeds[i] if i < 0 else targets.mutated(random.Random(f"{name} {i}"), seeds)
                begin = time.process_time()
                try:
                    run(data)
                except Exception as error:
                    raise AssertionError(f"input {i}: {data[:2000]!r}") from error
                assert time.process_time() - begin < 1, f"input {i} takes too long: {data[:2000]!r}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_targets_see_what_is_wrong(tmp_path):
    """A reader that lets something else out is found: the check itself is no formality."""
    with pytest.raises(AssertionError, match="not one line"), targets.refusals():
        raise EdgekvError("two\nlines")
    with pytest.raises(AssertionError, match="a message of"), targets.refusals():
        raise EdgekvError("x" * 5000)
    with pytest.raises(KeyError), targets.refusals():
        raise KeyError("x")
    with targets.refusals():
        raise EdgekvError("one line")


def test_mutations_are_the_same_every_time():
    seeds = [b"abc" * 100, b"x" * 3000]
    first = [targets.mutated(random.Random(i), seeds) for i in range(50)]
    assert first == [targets.mutated(random.Random(i), seeds) for i in range(50)]
    assert len(set(first)) == 50 and not set(first) & set(seeds)


def test_requests(llama_server, tmp_path):
    """Hundreds of requests that no client should send."""
    server_fuzz = module("server")
    model = write_tiny_model(tmp_path / "tiny.gguf")
    with served(llama_server, model, *server_fuzz.FLAGS) as server:
        outcomes = server_fuzz.fuzz(server, seed=1, n=400)
    print(f"\n{dict(outcomes.most_common())}")
    # both kinds came: what was answered, and what was refused
    assert outcomes["200"] >= 20 and outcomes["400"] >= 20
