"""tools/llama_source.py: the pin, the series, and the round trip between patches/ and a repository.

Most tests run a copy of the tool on a small made-up source distribution; one runs on the real one.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "llama_source.py"
OLD = 1_000_000_000

SOURCE = {
    "vendor/llama.cpp/.git": b"gitdir: ../../.git/modules/nowhere\n",
    "vendor/llama.cpp/.gitignore": b"*.bat\n",
    "vendor/llama.cpp/CMakeLists.txt": b"project(small)\n",
    "vendor/llama.cpp/ignored.bat": b"a file that its own .gitignore names\r\n",
    "vendor/llama.cpp/docs/large.md": b"not needed\n",
    "vendor/llama.cpp/src/one.c": b"".join(b"line %d\n" % i for i in range(40)),
    "llama_cpp/__init__.py": b'__version__ = "1.0"\n',
    "llama_cpp/lib/libllama.so": b"not needed\n",
    "LICENSE.md": b"a licence\n",
}
FIRST = b"""First change

Why it is there.
Until: upstream does it.
---
diff --git a/src/one.c b/src/one.c
--- a/src/one.c
+++ b/src/one.c
@@ -1,5 +1,5 @@
 line 0
-line 1
+line one
 line 2
 line 3
 line 4
diff --git a/src/two.c b/src/two.c
new file mode 100644
--- /dev/null
+++ b/src/two.c
@@ -0,0 +1 @@
+two
"""
SECOND = b"""Second change, on top
---
diff --git a/src/one.c b/src/one.c
--- a/src/one.c
+++ b/src/one.c
@@ -1,5 +1,6 @@
 line 0
 line one
+line one and a half
 line 2
 line 3
 line 4
"""


class Project:
    """A folder with the tool, patches/, ggml_ops/ and a source distribution in source/."""

    def __init__(self, root):
        self.root, self.source = root, root / "source"
        self.patches, self.ops = root / "patches", root / "ggml_ops"
        for folder in (self.source, self.patches, self.ops / "cpu", root / "tools"):
            folder.mkdir(parents=True)
        shutil.copy(TOOL, root / "tools")
        self.archive = self.source / "small_bindings-1.0.tar.gz"
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, data in SOURCE.items():
                member = tarfile.TarInfo("small_bindings-1.0/" + name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        self.pin(tree_sha256="0")
        self.write_series({"0001-first-change.patch": FIRST, "0002-second-change-on-top.patch": SECOND})
        (self.ops / "op.h").write_text("header\n")
        (self.ops / "cpu" / "op.c").write_text("body\n")
        # inside a repository whose ignore rules and state must not matter
        subprocess.run(["git", "init", "-q", root], check=True)
        (root / ".gitignore").write_text("build/\n")
        self.tree = root / "build" / "wheel" / "llama.cpp"

    def pin(self, **changes):
        path = self.patches / "pin.json"
        pin = json.loads(path.read_text()) if path.exists() else {
            "name": "small-bindings", "version": "1.0", "sha256": hashlib.sha256(self.archive.read_bytes()).hexdigest()}
        path.write_text(json.dumps({**pin, **changes}))

    def write_series(self, patches):
        for path in self.patches.glob("*.patch"):
            path.unlink()
        for name, text in patches.items():
            (self.patches / name).write_bytes(text)
        head = "# Applied in this order. Written by: tools/llama_source.py refresh\n"
        (self.patches / "series").write_text(head + "".join(f"{name}\n" for name in patches))

    def run(self, *arguments, source="", ok=True, **environment):
        done = subprocess.run(
            [sys.executable, self.root / "tools" / TOOL.name, *map(str, arguments)], capture_output=True, text=True,
            env={**os.environ, "EDGEKV_LLAMA_SOURCE": str(source or self.source), **environment})
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        if not ok:
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr if not ok else done.stdout

    def prepare(self, **options):
        return self.run("prepare", "--dest", self.tree, **options)

    def snapshot(self):
        return {path.relative_to(self.root): path.read_bytes()
                for path in sorted((self.root / "build").rglob("*")) if path.is_file()}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def test_prepare_applies_the_series_to_the_pristine_tree(project):
    project.prepare()
    one = (project.tree / "src/one.c").read_text().splitlines()
    assert one[:4] == ["line 0", "line one", "line one and a half", "line 2"]
    assert (project.tree / "src/two.c").read_text() == "two\n"
    assert (project.tree / "edgekv/cpu/op.c").read_text() == "body\n"
    assert not (project.tree / ".git").exists() and not (project.tree / "docs").exists()
    bindings = project.tree.parent / "bindings/llama_cpp"
    assert sorted(path.name for path in bindings.iterdir()) == ["LICENSE.md", "__init__.py"]
    assert sorted(path.name for path in project.tree.parent.iterdir()) == ["bindings", "llama.cpp"]


def test_second_prepare_copies_only_changed_ops(project):
    project.prepare()
    watched = ["CMakeLists.txt", "src/one.c", "edgekv/op.h", "edgekv/cpu/op.c"]
    for name in watched:
        os.utime(project.tree / name, (OLD, OLD))
    os.utime(project.ops / "op.h")  # touched, not changed
    (project.ops / "cpu/op.c").write_text("new body\n")
    (project.ops / "cpu/more.c").write_text("more\n")
    assert "copied cpu/more.c, cpu/op.c" in project.prepare(source="/nowhere")  # the source is not read again
    assert [name for name in watched if (project.tree / name).stat().st_mtime != OLD] == ["edgekv/cpu/op.c"]
    assert (project.tree / "edgekv/cpu/op.c").read_text() == "new body\n"
    (project.ops / "cpu/more.c").unlink()
    project.prepare()
    assert not (project.tree / "edgekv/cpu/more.c").exists()


def test_new_series_keeps_the_times_of_what_it_leaves_alone(project):
    project.prepare()
    watched = ["CMakeLists.txt", "src/one.c", "src/two.c", "edgekv/op.h"]
    for name in watched:
        os.utime(project.tree / name, (OLD, OLD))
    project.write_series({"0001-first-change.patch": FIRST})
    project.prepare()
    assert [name for name in watched if (project.tree / name).stat().st_mtime != OLD] == ["src/one.c"]
    assert "line one and a half" not in (project.tree / "src/one.c").read_text()


def test_broken_patch_names_itself_and_leaves_nothing(project):
    broken = {"0001-first-change.patch": FIRST, "0002-second-change-on-top.patch": SECOND.replace(b"line 3", b"line X")}
    project.write_series(broken)
    message = project.prepare(ok=False)
    for part in ("patches/0002-second-change-on-top.patch", "src/one.c", "likely cause", "next: tools/llama_source.py unpack"):
        assert part in message
    assert project.snapshot() == {}

    project.write_series({"0001-first-change.patch": FIRST})
    project.prepare()
    before = project.snapshot()
    project.write_series(broken)
    project.prepare(ok=False)
    assert project.snapshot() == before


def test_broken_patch_can_be_repaired_and_resumed(project):
    project.write_series({"0001-first-change.patch": FIRST.replace(b"line 3", b"line X"),
                          "0002-second-change-on-top.patch": SECOND})
    edit = project.root / "edit"
    assert "--resume" in project.run("unpack", "--dest", edit, ok=False)
    assert "series is not all there" in project.run("refresh", "--tree", edit, ok=False)
    (edit / "src/one.c").write_text((edit / "src/one.c").read_text().replace("line 1\n", "line one\n"))
    (edit / "src/two.c").write_text("two\n")
    commit(edit, "First change\n\nWhy it is there.\nUntil: upstream does it.\n")
    project.run("unpack", "--dest", edit, "--resume")
    project.run("refresh", "--tree", edit)
    assert (project.patches / "0001-first-change.patch").read_bytes() == FIRST
    assert (project.patches / "0002-second-change-on-top.patch").read_bytes() == SECOND


@pytest.mark.parametrize("change, message", [
    (lambda patches: (patches / "0002-second-change-on-top.patch").unlink(), "names 0002-second-change-on-top.patch"),
    (lambda patches: (patches / "0003-stray.patch").write_bytes(SECOND), "0003-stray.patch: not named in patches/series"),
    (lambda patches: (patches / "0001-first-change.patch").write_bytes(FIRST.replace(b"\n---\n", b"\n")), "not a header"),
    (lambda patches: (patches / "series").unlink(), "series: missing"),
    (lambda patches: (patches / "pin.json").write_text("{"), "pin.json: not a pin"),
])
def test_bad_series_or_pin(project, change, message):
    change(project.patches)
    assert message in project.prepare(ok=False)
    assert project.snapshot() == {}


def test_refresh_of_an_untouched_tree_is_byte_identical(project):
    assert "2 patch(es), the round trip is byte-identical" in project.run("check")
    (project.patches / "0002-second-change-on-top.patch").write_bytes(SECOND.replace(b"@@\n", b"@@ a note\n"))
    assert "patches/0002-second-change-on-top.patch: is not what refresh writes" in project.run("check", ok=False)


def test_refresh_does_not_depend_on_the_users_git_settings(project, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text("[diff]\n noprefix = true\n context = 9\n algorithm = patience\n[core]\n autocrlf = true\n"
                                     "[commit]\n gpgsign = true\n[apply]\n whitespace = error\n[user]\n useConfigOnly = true\n")
    project.run("check", HOME=str(home), GIT_DIR=str(project.root / ".git"))


def test_refresh_writes_edits_back(project):
    edit = project.root / "edit"
    project.run("unpack", "--dest", edit)
    assert (edit / "edgekv/op.h").read_text() == "header\n"
    (edit / "src/one.c").write_text((edit / "src/one.c").read_text() + "last\n")
    assert "src/one.c is not committed" in project.run("refresh", "--tree", edit, ok=False)
    commit(edit, "Third change\n\nWhy.\n")
    project.run("refresh", "--tree", edit)
    series = (project.patches / "series").read_text().splitlines()
    assert series[1:] == ["0001-first-change.patch", "0002-second-change-on-top.patch", "0003-third-change.patch"]
    assert (project.patches / "0001-first-change.patch").read_bytes() == FIRST
    third = (project.patches / "0003-third-change.patch").read_text()
    assert third.startswith("Third change\n\nWhy.\n---\ndiff --git a/src/one.c b/src/one.c\n--- a/src/one.c\n")
    assert "+last\n" in third
    project.run("check")
    # dropping a commit drops its patch
    subprocess.run(["git", "-C", edit, "reset", "-q", "--hard", "HEAD~2"], check=True)
    project.run("refresh", "--tree", edit)
    assert [path.name for path in project.patches.glob("*.patch")] == ["0001-first-change.patch"]


def test_wrong_sha256_is_refused(project):
    project.pin(sha256="0" * 64)
    message = project.prepare(ok=False)
    assert str(project.archive) in message and "sha256" in message
    assert project.snapshot() == {}


def test_source_folder_may_be_unpacked(project, tmp_path):
    with tarfile.open(project.archive) as tar:
        tar.extractall(tmp_path)
    unpacked = tmp_path / "small_bindings-1.0"
    message = project.prepare(source=unpacked, ok=False)  # the pin says "0"
    assert "EDGEKV_LLAMA_SOURCE" in message and "tree_sha256" in message
    project.pin(tree_sha256=message.partition("tree_sha256 is ")[2].partition(",")[0])
    project.prepare(source=unpacked / "vendor/llama.cpp")
    assert "line one" in (project.tree / "src/one.c").read_text()
    shutil.rmtree(project.tree)
    (unpacked / "vendor/llama.cpp/src/one.c").write_text("changed\n")
    assert "is not the unchanged small-bindings 1.0" in project.prepare(source=unpacked, ok=False)


def test_source_folder_without_a_source(project, tmp_path):
    assert "holds neither small_bindings-1.0.tar.gz nor its contents" in project.prepare(source=tmp_path, ok=False)


def test_the_real_series_round_trips():
    done = subprocess.run([sys.executable, TOOL, "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the round trip is byte-identical" in done.stdout


@pytest.mark.slow
def test_the_pinned_source_is_fetched_with_the_package_client(tmp_path):
    for name in ("tools/llama_source.py", "patches/pin.json"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if key != "EDGEKV_LLAMA_SOURCE"}
    done = subprocess.run([sys.executable, tmp_path / "tools/llama_source.py", "fetch"],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pin = json.loads((ROOT / "patches/pin.json").read_text())
    assert hashlib.sha256(Path(done.stdout.strip()).read_bytes()).hexdigest() == pin["sha256"]


def commit(tree, message):
    git = ["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=a@localhost"]
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", message], check=True)
