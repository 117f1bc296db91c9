"""Downloads, from a hub of our own on the loopback interface.

huggingface_hub reads its settings when it is imported, so what downloads runs in other processes: one for most tests,
and one more for each test that needs other settings.
"""

import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from edgekv import hub, pull
from edgekv.errors import EdgekvError
from hub_server import Hub, commit
from process import EDGEKV, python
from tinymodel import write_tiny_model

GIB = 1 << 30


# Answers calls, a JSON list per line: of a function of edgekv.hub ["name", arguments...] with its result or the error's
# text, of the command line ["edgekv", arguments...] with [exit status, standard output, standard error].
CHILD = python("""
import json, sys
from click.testing import CliRunner
from edgekv import cli, hub
from edgekv.errors import EdgekvError

for line in sys.stdin:
    name, *args = json.loads(line)
    if name == "edgekv":
        done = CliRunner().invoke(cli.main, args)
        answer = [done.exit_code, done.stdout, done.stderr]
    else:
        try:
            answer = str(getattr(hub, name)(*args))
        except EdgekvError as e:
            answer = str(e)
    print(json.dumps(answer), flush=True)
""")


class Child:
    """A process with an environment of its own that answers calls until it is closed."""

    def __init__(self, environment):
        self._process = subprocess.Popen(CHILD, env=environment, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, *call):
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        stderr = self._process.communicate(timeout=60)[1]
        assert self._process.returncode == 0 and stderr == "", stderr  # no warnings, no bars


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A hub, the environment of processes that use it, and one such process."""
    folder = tmp_path_factory.mktemp("hub")
    theirs = {k: v for k, v in os.environ.items()
              if not k.startswith(("HF_", "HUGGING", "TQDM")) and "proxy" not in k.lower()}
    with Hub(folder / "hub") as server:
        environment = theirs | {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_ETAG_TIMEOUT": "2"}
        child = Child(environment)
        yield server, environment, child
        child.close()


@pytest.fixture
def server(running):
    """The hub, empty and in good health; nothing is in the cache."""
    server, environment, _ = running
    server.reset()
    for folder in (server.root, environment["HF_HOME"]):
        shutil.rmtree(folder, ignore_errors=True)
    return server


@pytest.fixture
def nobody():
    """An address where no hub is."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def environment(running):
    return running[1]


@pytest.fixture
def home(environment):
    return Path(environment["HF_HOME"])


@pytest.fixture
def ask(running):
    """Calls functions of edgekv.hub: for each (name, arguments...) the path, or the error's text. With settings, in a
    process of its own."""
    def ask(*calls, **settings):
        child = Child(running[1] | settings) if settings else running[2]
        answers = [child(*call) for call in calls]
        if settings:
            child.close()
        assert not any("\n" in answer for answer in answers)
        return answers if len(answers) > 1 else answers[0]

    return ask


@pytest.fixture
def fails(running, home):
    """The command line: one line of error, and nothing half-written."""
    def contents():
        return {path for path in home.rglob("*") if path.is_file()} if home.is_dir() else set()

    def fails(why, *args, **settings):
        before = contents()
        child = Child(running[1] | settings) if settings else running[2]
        status, stdout, stderr = child("edgekv", *args)
        if settings:
            child.close()
        assert status == 1 and stdout == "" and why in stderr, stderr
        assert stderr.startswith("edgekv: error: ") and stderr.count("\n") == 1, stderr
        new = {path.relative_to(home / "hub") for path in contents() - before}
        assert not [path for path in new if path.name != "CACHEDIR.TAG" and not {".locks", "refs"} & set(path.parts)]

    return fails


def publish(server, repo, contents):
    """A repository with files of these names and contents."""
    folder = server.root / repo
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def below(folder):
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SMALL = {"config.json": b"{}", "tokenizer.json": b"[1]", "merges.txt": b"a b", "tokenizer.model": b"spm",
         "tokenizer.model.v3": b"spm3", "chat_template.jinja": b"{{ x }}", "README.md": b"# card",
         "additional_chat_templates/tools.jinja": b"{{ y }}"}
OTHERS = {"original/consolidated.00.pth": b"o", "original/params.json": b"{}", "onnx/model.onnx": b"o",
          "onnx/config.json": b"{}", "consolidated.safetensors": b"again", "model-q4.gguf": b"GGUF",
          "modeling.py": b"evil()",
          "pytorch_model.bin": b"again", "tf_model.h5": b"again", "training_args.bin": b"x", ".gitattributes": b"x",
          "adapter_model.safetensors": b"adapter", "fp16/model.safetensors": b"again", "logo.png": b"p"}


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("org/name", "hf:org/name", "Org-1/na.me_2", "org/name@main", "hf:org/name@v1.0", "0x/1b"):
        assert hub.is_repo_id(text) and hub.repo_id(text) == text.removeprefix("hf:")
    for text in ("name", "org/", "/name", "./name", "../name", "~/name", "org/name/file", "org/name:Q4_K_M", "hf:",
                 "org//name", "org/name@", "org/nam e", "hf:org/name/f.gguf", "org\\name", "org/name\n", ""):
        assert not hub.is_repo_id(text), text
        with pytest.raises(EdgekvError, match="not of the form ORG/NAME or ORG/NAME@REVISION$"):
            hub.repo_id(text)
    assert not hub.is_repo_id("models/m.gguf") and not hub.is_repo_id("filters/f.safetensors")  # misspelt paths
    (tmp_path / "org").mkdir()
    assert hub.is_repo_id("org/name")
    (tmp_path / "org" / "name").mkdir()
    assert not hub.is_repo_id("org/name") and hub.is_repo_id("hf:org/name")


def test_names_of_gguf_files():
    for text in ("hf:org//f.gguf", "hf:org/repo/file.bin", "hf:", "hf:org", "org/repo/f.gguf", "hf:org/repo:",
                 "hf:/org/repo"):
        with pytest.raises(EdgekvError, match="not of the form hf:ORG/REPO/FILE.gguf, hf:ORG/REPO:QUANT or hf:ORG"):
            hub.gguf(text)


def test_a_repository_without_hf_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgekvError, match="org/name: no such file; hf:org/name names a model on the Hugging Face hub"):
        pull.resolve_model("org/name")


def test_snapshot_takes_what_matches_once(server, ask):
    contents = {"a.json": b"1", "b.txt": b"2", "sub/c.json": b"3", "w.safetensors": b"4" * 5000}
    folder = publish(server, "org/name", contents)
    got = ask(("snapshot", "org/name", ["*.json", "w.*"]))
    assert below(got) == {name: contents[name] for name in ("a.json", "sub/c.json", "w.safetensors")}
    assert sorted(server.sent()) == ["a.json", "c.json", "w.safetensors"]

    server.log.clear()
    assert ask(("snapshot", "hf:org/name", ["*.json", "w.*"]), ("file", "org/name", "a.json")) == [got, got + "/a.json"]
    assert server.sent() == []
    assert ask(("snapshot", "org/name", ["*.zip", "x"])) == (
        "org/name: holds no *.zip or x; it holds a.json, b.txt, sub/c.json, w.safetensors")

    # a new version: only what changed, and the old folder stays
    (folder / "a.json").write_bytes(b"new")
    newer = ask(("snapshot", "org/name", ["*.json", "w.*"]))
    assert server.sent() == ["a.json"] and below(newer)["a.json"] == b"new" and below(got)["a.json"] == b"1"
    assert newer.endswith(commit(folder))


def test_revisions(server, ask):
    publish(server, "org/name", {"m.gguf": b"GGUF main", "new.gguf": b"GGUF"})
    old = publish(server, "org/name@v1", {"m.gguf": b"GGUF v1"})
    for name in ("v1", commit(old)):
        by_file, by_name, folder = ask(("gguf", f"hf:org/name@{name}/m.gguf"), ("gguf", f"hf:org/name@{name}"),
                                       ("snapshot", f"org/name@{name}", ["*"]))
        assert by_file == by_name == f"{folder}/m.gguf" and below(folder) == {"m.gguf": b"GGUF v1"}
    assert below(ask(("snapshot", "org/name", ["m*"]))) == {"m.gguf": b"GGUF main"}
    assert ask(("gguf", "hf:org/name@v2/m.gguf")) == (
        "hf:org/name@v2/m.gguf: no such revision (branch, tag or commit) of the repository")


def test_a_push_in_the_middle(server, ask):
    """All files are of the commit that the first is of."""
    old = {"a.json": b"old", "b.json": b"older", "m.safetensors": b"oldest" * 100}
    folder = publish(server, "org/name", old)

    def push():
        publish(server, "org/name@before", old)
        publish(server, "org/name", {name: b"new" * 500 for name in old})

    server.then["a.json"] = push
    got = ask(("snapshot", "org/name", ["*"]))
    assert below(folder)["b.json"] == b"new" * 500 and below(got) == old


def test_a_checkpoint(server, ask):
    shards = {f"model-0000{i}-of-00002.safetensors": b"w%d" % i for i in (1, 2)}
    publish(server, "org/name", SMALL | OTHERS | shards | {"model.safetensors.index.json": b"{}"})
    got = ask(("checkpoint", "org/name"))
    assert below(got) == SMALL | shards | {"model.safetensors.index.json": b"{}"}
    assert sorted(server.sent()[-2:]) == sorted(shards)  # where they are, the rest is


def test_a_checkpoint_of_pickles(server, ask):
    weights = {"pytorch_model-00001-of-00001.bin": b"1"}
    publish(server, "org/name", SMALL | weights | {
        "training_args.bin": b"x", "fp16/model.safetensors": b"x", "adapter_model.safetensors": b"x"})
    assert below(ask(("checkpoint", "org/name"))) == SMALL | weights


@pytest.mark.parametrize("contents, why", [
    ({"a.gguf": b"", "README.md": b""}, "holds GGUF files and no checkpoint; name one of them: hf:ORG/REPO:QUANT or"),
    ({"config.json": b"", "tf_model.h5": b""},
     "holds no weights (*.safetensors or pytorch_model*.bin); it holds config.json, tf_model.h5"),
    ({"config.json": b"", "consolidated.safetensors": b""}, "holds no weights"),
    ({"data.csv": b""}, "holds no checkpoint of transformers (config.json); it holds data.csv"),
    ({"config.json": b"", "model-00001-of-00003.safetensors": b""},
     "the repository lacks model-00002-of-00003.safetensors, model-00003-of-00003.safetensors; it holds config.json"),
])
def test_no_checkpoint(server, ask, contents, why):
    publish(server, "org/name", contents)
    assert ask(("checkpoint", "org/name")).startswith(f"org/name: {why}") and server.sent() == []


def test_a_dropped_connection_is_resumed(server, ask):
    data = os.urandom(12 << 20)  # huggingface_hub writes 10 MiB at a time
    publish(server, "org/name", {"m.gguf": data})
    server.drop["m.gguf"] = 11 << 20
    path = ask(("gguf", "hf:org/name/m.gguf"))
    assert open(path, "rb").read() == data
    first, second = [r.range for r in server.log if r.method == "GET" and r.path.endswith("m.gguf")]
    assert first is None and second == f"bytes={10 << 20}-"


def test_tokens(server, ask, home):
    publish(server, "org/name", {"m.gguf": b"GGUF", "t.json": b"{}"})
    server.token = "hf_right"
    call = ("snapshot", "org/name", ["*"])
    assert ask(call) == "org/name: no such model on the hub, or it is private or gated: check the name, or set HF_TOKEN"
    assert ask(call, HF_TOKEN="hf_wrong") == "org/name: the hub does not know the token; check HF_TOKEN"
    assert server.sent() == []
    server.log.clear()
    assert sorted(below(ask(call, HF_TOKEN="hf_right"))) == ["m.gguf", "t.json"]
    asked = [r for r in server.log if "org/name" in r.path]
    assert {r.token for r in asked if not r.path.startswith("/org/name/m")} == {"hf_right"}
    assert {r.token for r in asked if r.path.startswith("/org/name/m")} == {None}  # the store

    (server.root / "org" / "name" / "t.json").write_bytes(b"[]")
    (home / "token").write_text("hf_right\n")  # as `hf auth login` leaves it
    assert below(ask(call))["t.json"] == b"[]"


def test_quantisations(server, ask):
    names = ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.q4_0.gguf", "m-Q4_0_4_4.gguf", "m-IQ4_XS.gguf", "UD/m-Q8_0.gguf",
             "m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf", "mmproj-m-f16.gguf", "imatrix-Q2_K.gguf",
             "mtp-m-Q4_K_M.gguf", "m-Q5_K_M-v1.gguf", "m-Q5_K_M-v2.gguf", "m-Q3_K.gguf.txt")
    publish(server, "org/name", {name: name.encode() for name in names})
    wanted = {"Q4_K_M": names[0], "q4_k_s": names[1], "Q4_0": names[2], "iq4_xs": names[4], "q8_0": names[5],
              "F16": names[6]}
    for (quant, name), path in zip(wanted.items(), ask(*(("gguf", f"hf:org/name:{q}") for q in wanted))):
        assert path.endswith("/" + name) and open(path).read() == name, quant

    several, none, other, plain = ask(("gguf", "hf:org/name:Q5_K_M"), ("gguf", "hf:org/name:Q4_K"),
                                      ("gguf", "hf:org/name:Q4_XS"), ("gguf", "hf:org/name"))
    assert several == ("hf:org/name:Q5_K_M: 2 GGUF files have Q5_K_M in their names; add /FILE.gguf instead, one of "
                       "m-Q5_K_M-v1.gguf, m-Q5_K_M-v2.gguf")
    assert none.startswith("hf:org/name:Q4_K: no GGUF file has Q4_K in its name; there are UD/m-Q8_0.gguf, m-IQ4_XS")
    assert other.startswith("hf:org/name:Q4_XS: no GGUF file has Q4_XS in its name; there are ")
    assert plain.startswith("hf:org/name: holds 9 GGUF files; add :QUANT or /FILE.gguf to choose from UD/m-Q8_0.gguf,")
    assert "mmproj" not in plain and "00002-of" not in plain and "imatrix" not in plain and "mtp" not in plain


def test_a_repository_with_one_gguf(server, ask):
    publish(server, "org/one", {"m-Q8_0.gguf": b"1", "mmproj-m.gguf": b"2", "README.md": b"3"})
    publish(server, "org/checkpoint", SMALL)
    publish(server, "org/data", {"d.csv": b""})
    assert ask(("gguf", "hf:org/one"))[-12:] == "/m-Q8_0.gguf" and server.sent() == ["m-Q8_0.gguf"]
    assert ask(("gguf", "hf:org/checkpoint"), ("gguf", "hf:org/checkpoint:Q4_0"), ("gguf", "hf:org/data")) == [
        "hf:org/checkpoint: is a checkpoint without a GGUF file; run edgekv convert org/checkpoint first",
        "hf:org/checkpoint:Q4_0: is a checkpoint without a GGUF file; run edgekv convert org/checkpoint first",
        "hf:org/data: holds no GGUF file; it holds d.csv"]


def test_split_files(server, ask):
    parts = {f"sub/m-0000{i}-of-00003.gguf": b"%d" % i for i in (1, 2, 3)}
    publish(server, "org/name", parts | {"m.gguf": b"other"})
    path = ask(("gguf", "hf:org/name/sub/m-00001-of-00003.gguf"))
    assert path.endswith("/sub/m-00001-of-00003.gguf")
    assert below(path.removesuffix("/sub/m-00001-of-00003.gguf")) == parts
    assert ask(("gguf", "hf:org/name/sub/m-00002-of-00003.gguf")).endswith(
        ": is one part of 3: name the first, sub/m-00001-of-00003.gguf")
    (server.root / "org" / "name" / "sub" / "m-00003-of-00003.gguf").unlink()
    assert "the repository lacks sub/m-00003-of-00003.gguf;" in ask(("gguf", "hf:org/name/sub/m-00001-of-00003.gguf"))
    publish(server, "org/odd", {"m-00000-of-00000.gguf": b"whole"})
    assert ask(("gguf", "hf:org/odd")).endswith("/m-00000-of-00000.gguf")


def test_without_the_hub(server, ask, nobody):
    """What was fetched serves: in offline mode, on a bad day of the hub, and when there is no way to it."""
    weights = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    publish(server, "org/whole", SMALL | weights)
    publish(server, "org/half", SMALL | weights)
    publish(server, "org/gguf", {"m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF"})
    calls = [("checkpoint", "org/whole"), ("file", "org/whole", "config.json"), ("snapshot", "org/whole", ["*.json"]),
             ("gguf", "hf:org/gguf/m-Q4_0.gguf"), ("gguf", "hf:org/gguf:q4_0")]
    got = ask(*calls)
    ask(("snapshot", "org/half", ["*.json", "*-00001-*"]))
    server.log.clear()
    others = [("checkpoint", "org/half"), ("checkpoint", "org/never"), ("gguf", "hf:org/gguf:q8_0"),
              ("file", "org/whole", "none"), ("snapshot", "org/half", ["*.bin"])]

    found = ask(*calls, *others, HF_HUB_OFFLINE="1")
    assert found[:5] == got and server.log == []
    assert found[5:] == [f"{name}: not in the cache, and HF_HUB_OFFLINE is set; unset it, or pass a local path"
                         for name in ("org/half", "org/never", "hf:org/gguf:q8_0", "org/whole/none", "org/half")]
    server.status = 503
    found = ask(*calls, *others)
    assert found[:5] == got and not [r for r in server.log if "/resolve/" in r.path]  # asked once is enough
    assert all(text.endswith(": the hub answers with status 503; try again later, or pass a local path")
               for text in found[5:])
    found = ask(*calls, *others, HF_ENDPOINT=nobody)
    assert found[:5] == got
    assert all("refused; try again, or pass a local path" in text and ": the hub cannot be reached: " in text
               for text in found[5:]), found


def test_the_command_line_reads_a_model_from_the_hub(server, environment, tmp_path):
    (server.root / "org" / "name").mkdir(parents=True)
    model = write_tiny_model(server.root / "org" / "name" / "tiny-F16.gguf")
    for command in (("pull", "hf:org/name:f16"), ("inspect", "hf:org/name", "-o", "json")):
        done = subprocess.run([*EDGEKV, *command], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == ("pulling hf:org/name:f16\n" if command[0] == "pull" else "")
        path = done.stdout.strip() if command[0] == "pull" else json.loads(done.stdout)["model"]
        assert open(path, "rb").read() == model.read_bytes() and path.endswith("/tiny-F16.gguf")


def test_errors_of_names(server, fails):
    publish(server, "org/name", {"m.gguf": b"GGUF"})
    fails("hf:org/none/x.gguf: no such model on the hub, or it is private or gated: check the name, or set HF_TOKEN",
          "inspect", "hf:org/none/x.gguf")
    fails("hf:org/none/x.gguf: no such model on the hub", "inspect", "hf:org/none/x.gguf", HF_TOKEN="hf_any")
    fails("hf:org/name/x.gguf: the repository lacks x.gguf; it holds m.gguf", "inspect", "hf:org/name/x.gguf")
    fails("hf:a--b/c: cannot be fetched: Cannot have -- or .. in repo_id", "inspect", "hf:a--b/c")


def test_convert_of_what_the_hub_does_not_give(server, fails, nobody, tmp_path, monkeypatch):
    """Before anything is written: no new file in the working folder, which is where it would be."""
    monkeypatch.chdir(tmp_path)
    publish(server, "org/name", {"m.gguf": b"GGUF"})
    command = ("convert", "org/none", "--with-qfilters")
    fails("org/none: no such model on the hub, or it is private or gated: check the name, or set HF_TOKEN", *command)
    fails("org/name: holds GGUF files and no checkpoint; name one of them", "convert", "org/name")
    fails("org/none: the hub cannot be reached: ", *command, HF_ENDPOINT=nobody)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_hub(server, ask, fails, nobody):
    publish(server, "org/name", {"m.gguf": b"GGUF" * 1000})
    model = ("inspect", "hf:org/name/m.gguf")
    server.gated = True
    for token in ({}, {"HF_TOKEN": "hf_any"}):
        fails("m.gguf: the model is gated: accept its terms on its page on the hub, and set HF_TOKEN", *model, **token)
    server.gated = False
    for status, why in ((500, "the hub answers with status 500; try again later, or pass a local path"),
                        (429, "too many requests from here; try again later"),
                        (403, "the hub refuses access (403); check what the token in HF_TOKEN may read")):
        server.status = status
        fails(why, *model)
    server.status = None
    server.page = "<html>Welcome to our hotel</html>"
    fails("what answers is not the hub; check HF_ENDPOINT and the proxy, or pass a local path", *model)
    server.page = None
    server.stalls = True
    fails("timed out; try again, or pass a local path", *model, HF_HUB_ETAG_TIMEOUT="1")
    server.stalls = False
    server.announced["m.gguf"] = 4001
    fails("m.gguf: cannot be fetched: Consistency check failed: file should be of size 4001 but has size 4000", *model)
    ask(("gguf", model[1]))  # one line from the library too
    fails("cannot be reached: ", *model, HF_ENDPOINT="nowhere")
    fails("refused; try again, or pass a local path", *model, HF_ENDPOINT=nobody)


def test_no_space(server, ask, home, fails):
    publish(server, "org/name", {"a.gguf": b"GGUF" * 1000, "b.gguf": b"other" * 1000})
    ask(("file", "org/name", "a.gguf"))
    server.announced["b.gguf"] = server.announced["a.gguf"] = 1 << 60
    fails(f"hf:org/name/b.gguf: {GIB:,}.00 GiB to fetch, but {home}", "inspect", "hf:org/name/b.gguf")
    assert ask(("file", "org/name", "a.gguf")).endswith("a.gguf")  # what is there takes no space

    # a whole model where a small file is expected
    assert ask(("snapshot", "org/name", ["*.gguf"], 1 << 20)).endswith("too much for what is asked of it; is it the right name?")

    server.announced.clear()
    home.joinpath("file").write_bytes(b"")
    fails(f"cannot be kept in the cache ({home / 'file'}", "inspect", "hf:org/name/b.gguf", HF_HOME=str(home / "file"))


def test_a_disk_that_fills_up(server, environment, home):
    """The system refuses to write on, as it does when other programs fill the disk meanwhile."""
    publish(server, "org/name", {"m.gguf": b"GGUF" * 100_000})
    done = subprocess.run([*EDGEKV, "inspect", "hf:org/name/m.gguf"], env=environment, capture_output=True, text=True,
                          timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("edgekv: error: hf:org/name/m.gguf: cannot be kept in the cache: "), done.stderr
    assert "HF_HOME" in done.stderr
    assert [p for p in home.rglob("*") if p.is_file() and p.stat().st_size > 1000] == []


def test_ctrl_c(server, environment, home):
    publish(server, "org/name", {"m.gguf": b"GGUF" * 100_000})
    server.hold["m.gguf"] = 200_000
    process = subprocess.Popen([*EDGEKV, "inspect", "hf:org/name/m.gguf"], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.holding.wait(30)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.strip() == "edgekv: error: interrupted" and stdout == ""
    assert list(home.rglob("*.incomplete")) == list(home.rglob("*.gguf")) == []


def test_bars_on_a_terminal(server, environment):
    publish(server, "org/name", {"m.gguf": b"GGUF" * 1000})
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    done = subprocess.run([*EDGEKV, "pull", "hf:org/name/m.gguf"], env=environment, stdout=subprocess.PIPE,
                          stderr=stderr, timeout=60)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert done.returncode == 0 and b"m.gguf" in shown and b"100%" in shown


def test_without_huggingface_hub(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: hub.gguf("hf:org/name/m.gguf"), lambda: hub.checkpoint("org/name")):
        with pytest.raises(EdgekvError, match="needs the package huggingface_hub; pip install huggingface_hub"):
            call()
