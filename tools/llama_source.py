#!/usr/bin/env python3
"""Fetches the pinned llama.cpp, applies patches/ to it, and writes patches/ back from a repository.

    prepare --dest DIR   the patched tree that CMake builds, with the published bindings beside it
    unpack  --dest DIR   the same as a git repository, one commit per patch, to edit
    refresh --tree DIR   patches/ again from that repository's commits
    check                unpack and refresh in a temporary folder give patches/ byte for byte
    fetch                only the source distribution; prints its path

The pin is patches/pin.json. EDGEKV_LLAMA_SOURCE names a folder that replaces the download: one that
holds the source distribution, or the unpacked one.

A patch is a header (what, why, until when), a line "---", and a diff without index lines, dates or
authors, so that it only depends on what it changes. Its file is named after its header's first line.
"""

import argparse
import contextlib
import filecmp
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
OPS = ROOT / "ggml_ops"
DOWNLOADS = ROOT / "build" / "download"
STAMP = ".edgekv-stamp.json"
UNFINISHED = "edgekv-unfinished"
SERIES_HEAD = "# Applied in this order. Written by: tools/llama_source.py refresh\n"
DIFF = ["diff-tree", "-p", "--no-commit-id", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--binary",
        "--diff-algorithm=myers", "--indent-heuristic", "-U3", "--inter-hunk-context=0",
        "--src-prefix=a/", "--dst-prefix=b/"]


class Failure(Exception):
    """One line for the user: the file or flag, and what to do."""


# --- the pinned source ---------------------------------------------------------------------------


def read_pin():
    path = PATCHES / "pin.json"
    try:
        pin = json.loads(path.read_text())
        return {key: pin[key] for key in ("name", "version", "sha256", "tree_sha256")}
    except (OSError, ValueError, KeyError) as error:
        raise Failure(f"{path}: not a pin with name, version, sha256 and tree_sha256 ({error!r}); restore it from git")


def archive_name(pin):
    return f"{pin['name'].replace('-', '_')}-{pin['version']}.tar.gz"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verified(archive, pin):
    found = sha256(archive)
    if found != pin["sha256"]:
        raise Failure(f"{archive}: sha256 is {found}, patches/pin.json says {pin['sha256']}; "
                      f"remove the file to fetch it again, or get {pin['name']} {pin['version']} itself")
    return archive


def fetch(pin):
    """The source distribution, from the cache or through pip, checked against the pin."""
    archive = DOWNLOADS / archive_name(pin)
    if archive.exists():
        return verified(archive, pin)
    if importlib.util.find_spec("pip") is None:
        raise Failure(f"{sys.executable} has no pip to fetch {pin['name']} with; run: {sys.executable} -m ensurepip")
    print(f"fetching {archive.name} (73 MiB)", file=sys.stderr, flush=True)
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DOWNLOADS) as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "--no-binary", pin["name"], "--dest", temporary, "-r", str(requirements)]
        if importlib.util.find_spec("scikit_build_core"):
            # pip asks the package's build backend for metadata: already here when our own build runs us
            command.append("--no-build-isolation")
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        got = Path(temporary, archive.name)
        if done.returncode or not got.exists():
            reason = last_error(done.stdout) or f"no {archive.name} among the files"
            raise Failure(f"pip could not fetch {pin['name']} {pin['version']}: {reason}; without a network, put "
                          f"{archive.name} into a folder and set EDGEKV_LLAMA_SOURCE to that folder")
        os.replace(verified(got, pin), archive)
    return archive


def last_error(output):
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return ([line for line in lines if line.lower().startswith("error")] or lines or [""])[-1]


def wanted(name):
    """Where a file of the source distribution goes, or None: the tree less its bulk, and the bindings."""
    tree = "vendor/llama.cpp/"
    if name.startswith(tree):
        # .git is a stray file that points nowhere; docs and vocabularies are 110 MB that no build reads
        rest = name[len(tree):]
        bulk = rest.split("/")[0] in (".git", "docs", "models") and not rest.startswith("models/templates/")
        return None if bulk else "llama.cpp/" + rest
    if name.startswith("llama_cpp/") and (name.endswith(".py") or name.endswith("/py.typed")):
        return "bindings/" + name
    return "bindings/llama_cpp/LICENSE.md" if name == "LICENSE.md" else None


def unpack_source(pin, into):
    """Writes INTO/llama.cpp and INTO/bindings/llama_cpp, pristine."""
    override = os.environ.get("EDGEKV_LLAMA_SOURCE")
    if not override:
        return extract(fetch(pin), into)
    folder = Path(override)
    if folder.name == "llama.cpp" and folder.parent.name == "vendor":
        folder = folder.parent.parent
    if (folder / archive_name(pin)).is_file():
        return extract(verified(folder / archive_name(pin), pin), into)
    if not (folder / "vendor/llama.cpp/CMakeLists.txt").is_file() or not (folder / "llama_cpp/__init__.py").is_file():
        raise Failure(f"EDGEKV_LLAMA_SOURCE={override}: holds neither {archive_name(pin)} nor its contents "
                      f"(vendor/llama.cpp and llama_cpp); point it at one of them, or unset it to download")
    for path in sorted(folder.rglob("*")):
        target = wanted(path.relative_to(folder).as_posix())
        if target and path.is_file() and ".git" not in path.relative_to(folder).parts:
            (into / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into / target)
            (into / target).chmod(0o755 if os.access(path, os.X_OK) else 0o644)
    found = tree_sha256(into)
    if found != pin["tree_sha256"]:
        raise Failure(f"EDGEKV_LLAMA_SOURCE={override}: is not the unchanged {pin['name']} {pin['version']} (tree_sha256 "
                      f"is {found}, patches/pin.json says {pin['tree_sha256']}); unpack {archive_name(pin)} again")


def extract(archive, into):
    with tarfile.open(archive) as tar:
        for member in tar:
            target = wanted(member.name.partition("/")[2])
            if target and member.isfile() and ".." not in target.split("/"):
                (into / target).parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(into / target, "wb") as file:
                    shutil.copyfileobj(source, file)
                (into / target).chmod(0o755 if member.mode & 0o100 else 0o644)


def tree_sha256(folder):
    digest = hashlib.sha256()
    for name in files_of(folder):
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- patches -------------------------------------------------------------------------------------


def series():
    path = PATCHES / "series"
    if not path.is_file():
        raise Failure(f"{path}: missing; restore it from git")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    there = {patch.name for patch in PATCHES.glob("*.patch")}
    for name in names:
        if name not in there:
            raise Failure(f"patches/series: names {name}, which is not in patches/; restore the file or drop the line")
    if extra := sorted(there - set(names)):
        raise Failure(f"patches/{extra[0]}: not named in patches/series; add it there, or remove the file")
    return [PATCHES / name for name in names]


def git(folder, *arguments, data=None):
    """git on FOLDER alone: blind to a repository around it and to the user's settings."""
    folder = Path(os.path.realpath(folder))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "XDG_"))}
    environment.update(HOME=os.devnull, GIT_CONFIG_NOSYSTEM="1", GIT_CEILING_DIRECTORIES=str(folder.parent),
                       LC_ALL="C", **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
                                      for what, value in (("NAME", "edgekv"), ("EMAIL", "edgekv@localhost"))})
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=environment, input=data,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise Failure("git: not found, and the patches are applied with it; install git")
    if done.returncode:
        raise Failure(f"git {arguments[0]} in {folder}: {last_error(done.stderr.decode(errors='replace'))}")
    return done.stdout


def header_of(patch):
    header, mark, diff = patch.read_bytes().partition(b"\n---\n")
    if not mark or not header.strip() or not diff.strip():
        raise Failure(f"patches/{patch.name}: not a header, a line '---' and a diff; restore it from git")
    return header.strip() + b"\n"


def apply(tree, patch, pin, *options):
    header_of(patch)
    try:
        git(tree, "apply", "--whitespace=nowarn", *options, str(patch))
        # git apply skips, without a word, files that it takes to be outside of its repository
        git(tree, "apply", "--reverse", "--check", str(patch))
    except Failure as error:
        reason = str(error).partition("error: ")[2] or str(error)
        raise Failure(f"patches/{patch.name} does not apply to {pin['name']} {pin['version']} ({reason}); likely cause: "
                      f"the pin or an earlier patch of the series changed these lines")


def copy_ops(tree):
    """Makes TREE/edgekv equal to ggml_ops/. An unchanged file keeps its time, so only changed ones recompile."""
    target = tree / "edgekv"
    ours = set(files_of(OPS)) if OPS.is_dir() else set()
    changed = []
    for name in sorted(ours):
        new = target / name
        if not new.is_file() or not filecmp.cmp(OPS / name, new, shallow=False):
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(OPS / name, new)
            changed.append(name)
    for name in sorted(set(files_of(target)) - ours):
        (target / name).unlink()
        changed.append(name)
    return changed


def keep_times(old, new):
    """Gives files of NEW that equal those of OLD their times, so that a new series recompiles what it changes."""
    for name in files_of(new):
        if (old / name).is_file() and filecmp.cmp(old / name, new / name, shallow=False):
            times = (old / name).stat()
            os.utime(new / name, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- commands ------------------------------------------------------------------------------------


def prepare(dest):
    pin, patches = read_pin(), series()
    stamp = {"pin": pin, "tool": sha256(__file__), "patches": {patch.name: sha256(patch) for patch in patches}}
    stamp["order"] = [patch.name for patch in patches]
    bindings = dest.parent / "bindings"
    if bindings.is_dir() and read_stamp(dest) == stamp:
        changed = copy_ops(dest)
        print(f"{dest}: up to date with patches/" + (f"; copied {', '.join(changed)}" if changed else ""))
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".llama-source-", dir=dest.parent) as temporary:
        staged = Path(temporary)
        unpack_source(pin, staged)
        tree = staged / "llama.cpp"
        for patch in patches:
            try:
                apply(tree, patch, pin)
            except Failure as error:
                raise Failure(f"{error}; next: tools/llama_source.py unpack --dest build/tree stops at this patch "
                              f"and says how to repair it")
        copy_ops(tree)
        for old, new in ((dest, tree), (bindings, staged / "bindings")):
            if old.is_dir():
                keep_times(old, new)
                os.replace(old, staged / ("old-" + new.name))
            os.replace(new, old)
        # last: a prepare that was interrupted above is done again
        (dest / STAMP).write_text(json.dumps(stamp, indent=1))
    print(f"{dest}: {pin['name']} {pin['version']} with {len(patches)} patch(es)")


def read_stamp(tree):
    try:
        return json.loads((tree / STAMP).read_text())
    except (OSError, ValueError):
        return None


def unpack(dest, resume=False):
    pin, patches = read_pin(), series()
    if resume:
        clean_repository(dest)
        done = len(commits(dest))
    else:
        if dest.exists() and any(dest.iterdir()):
            raise Failure(f"--dest {dest}: is not empty; name a new folder (or --resume after a repaired patch)")
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".llama-source-", dir=dest.parent) as temporary:
            unpack_source(pin, Path(temporary))
            tree = Path(temporary, "llama.cpp")
            git(tree, "-c", "init.defaultBranch=main", "init", "-q")
            (tree / ".git/info").mkdir(exist_ok=True)
            (tree / ".git/info/exclude").write_text("/edgekv\n")
            git(tree, "add", "--all", "--force", ".")
            git(tree, "commit", "-q", "-m", f"{pin['name']} {pin['version']}, pristine")
            # a link, so that there is one place to edit our own files
            (tree / "edgekv").symlink_to(OPS, target_is_directory=True)
            if dest.exists():
                dest.rmdir()
            os.replace(tree, dest)
        done = 0
    unfinished = dest / ".git" / UNFINISHED
    for patch in patches[done:]:
        try:
            apply(dest, patch, pin, "--index")
        except Failure as error:
            unfinished.write_text(patch.name)
            raise Failure(f"{error}; next: {dest} holds the patches before it; there, git apply --reject {patch}, "
                          f"repair it, commit it with its header as the message, then unpack --dest {dest} --resume")
        git(dest, "commit", "-q", "--cleanup=verbatim", "-F", "-", data=header_of(patch))
    if unfinished.exists():
        unfinished.unlink()
    print(f"{dest}: {pin['name']} {pin['version']} and {len(patches)} patch(es) as commits; "
          f"edit, commit, then: tools/llama_source.py refresh --tree {dest}")


def commits(tree):
    """The commits after the first one, which is the pristine tree; a straight line."""
    listed = [line.split() for line in git(tree, "rev-list", "--reverse", "--parents", "HEAD").decode().splitlines()]
    for line in listed[1:]:
        if len(line) != 2:
            raise Failure(f"--tree {tree}: {line[0][:12]} is a merge; rebase, so that each patch is one commit")
    return [line[0] for line in listed[1:]]


def clean_repository(tree):
    if not (tree / ".git").is_dir():
        raise Failure(f"{tree}: not a repository that unpack made; run: tools/llama_source.py unpack --dest {tree}")
    if changed := git(tree, "status", "--porcelain").decode().splitlines():
        raise Failure(f"{tree}: {changed[0][3:]} is not committed; git -C {tree} add it, then commit, or commit --amend "
                      f"into the patch it belongs to")


def patch_text(tree, commit):
    message = git(tree, "log", "-1", "--format=%B", commit).strip()
    diff = git(tree, *DIFF, commit)
    subject = message.decode().splitlines()[0] if message else ""
    if not diff.strip():
        raise Failure(f"--tree {tree}: commit {commit[:12]} ({subject}) changes nothing; drop it")
    if b"\nGIT binary patch\n" in diff:
        raise Failure(f"--tree {tree}: commit {commit[:12]} ({subject}) changes a binary file; a patch holds text only")
    # hunks start with ' ', '+', '-', '@' or '\', so only header lines can start like this
    lines = [line for line in diff.split(b"\n") if not line.startswith(b"index ")]
    slug = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")[:60].strip("-")
    return slug, message + b"\n---\n" + b"\n".join(lines)


def refresh(tree, patches=None):
    patches = patches or PATCHES
    clean_repository(tree)
    if (tree / ".git" / UNFINISHED).exists():
        raise Failure(f"--tree {tree}: the series is not all there; run: "
                      f"tools/llama_source.py unpack --dest {tree} --resume")
    new = {}
    for number, commit in enumerate(commits(tree), 1):
        slug, text = patch_text(tree, commit)
        new[f"{number:04d}-{slug}.patch"] = text
    listing = SERIES_HEAD + "".join(name + "\n" for name in new)
    for name, text in {**new, "series": listing.encode()}.items():
        path = patches / name
        if not path.is_file() or path.read_bytes() != text:
            path.write_bytes(text)
            print(f"wrote {path}")
    for path in sorted(patches.glob("*.patch")):
        if path.name not in new:
            path.unlink()
            print(f"removed {path}")


def check():
    with tempfile.TemporaryDirectory(prefix="edgekv-check-") as temporary:
        tree, again = Path(temporary, "tree"), Path(temporary, "patches")
        again.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            unpack(tree)
            refresh(tree, again)
        ours = {path.name for path in PATCHES.glob("*.patch")} | {"series"}
        theirs = {path.name for path in again.iterdir()}
        for name in sorted(ours | theirs):
            if name not in ours or name not in theirs or (PATCHES / name).read_bytes() != (again / name).read_bytes():
                raise Failure(f"patches/{name}: is not what refresh writes; run unpack, then refresh, and commit the result")
    print(f"patches/: {len(ours) - 1} patch(es), the round trip is byte-identical")


def main():
    parser = argparse.ArgumentParser(prog="llama_source.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("prepare").add_argument("--dest", type=Path, required=True)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("--dest", type=Path, required=True)
    unpacking.add_argument("--resume", action="store_true", help="go on after a patch that was repaired by hand")
    commands.add_parser("refresh").add_argument("--tree", type=Path, required=True)
    commands.add_parser("check")
    commands.add_parser("fetch")
    arguments = parser.parse_args()
    try:
        if arguments.command == "prepare":
            prepare(arguments.dest.absolute())
        elif arguments.command == "unpack":
            unpack(arguments.dest.absolute(), arguments.resume)
        elif arguments.command == "refresh":
            refresh(arguments.tree.absolute())
        elif arguments.command == "check":
            check()
        else:
            print(fetch(read_pin()))
    except (Failure, OSError) as error:
        sys.exit(f"llama_source.py: {error}")


if __name__ == "__main__":
    main()
