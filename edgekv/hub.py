"""Downloads from the Hugging Face hub: through huggingface_hub, into its cache, with its settings.

Names are ORG/NAME or ORG/NAME@REVISION (a branch, a tag or a commit), with or without ``hf:`` before them. HF_HOME,
HF_HUB_CACHE, HF_TOKEN or the stored token, HF_ENDPOINT and HF_HUB_OFFLINE count. huggingface_hub takes up a dropped
connection where it broke, and a file that is whole in the cache is not sent again. When the hub cannot be asked, what
the cache holds is used. On a terminal huggingface_hub draws its bars on standard error; elsewhere nothing is printed.

Every failure is an EdgekvError of one line. Files are fetched one after another in the calling thread: a pool of
threads, as snapshot_download has, would finish its files before Ctrl-C got through.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edgekv.errors import EdgekvError

# what the converter and transformers read of a checkpoint beside its weights; no code: nobody should run a stranger's
CHECKPOINT_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer.*", "README.md",
                       "additional_chat_templates/*.jinja")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind there is; the second often holds the same again
OTHER_WEIGHTS = ("consolidated*", "adapter_model*")  # the same in Mistral's form; what needs a base model

# GGUF files that are no model of their own: of images, of calibrations, drafts for another model
OTHER_GGUF = re.compile(r"mmproj|imatrix|(mtp|eagle3|dflash|dspark)-", re.I)

_NAME = re.compile(r"(?:hf:)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?"
                   r"(?:/(?P<file>.+)|:(?P<quantisation>\w[\w.-]*))?", re.ASCII)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def is_repo_id(text: str) -> bool:
    """Whether ``text`` is ORG/NAME or ORG/NAME@REVISION and not a path; with ``hf:`` before it, it cannot be a path."""
    m = _NAME.fullmatch(text)
    if m is None or m["file"] or m["quantisation"]:
        return False
    misspelt = text.lower().endswith((".gguf", ".safetensors", ".bin"))  # a path
    return text.startswith("hf:") or not (misspelt or os.path.lexists(text))


def repo_id(text: str) -> str:
    """``text`` without ``hf:``. EdgekvError unless ORG/NAME or ORG/NAME@REVISION is left."""
    _split(text)
    return text.removeprefix("hf:")


def _split(text: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision)"""
    m = _NAME.fullmatch(text)
    if m is None or m["file"] or m["quantisation"]:
        raise EdgekvError(f"{text}: not of the form ORG/NAME or ORG/NAME@REVISION")
    return m["repo"], m["revision"]


def snapshot(repo_id: str, patterns: Sequence[str], max_bytes: int | None = None) -> Path:
    """The folder of a repository in the cache, with the files that match any of ``patterns`` (* matches / too).

    Other files may lie there too. EdgekvError if none matches, if together they are larger than ``max_bytes``, or if they
    cannot be fetched.
    """
    repo, revision = _split(repo_id)
    with _one_line(repo_id):
        found = _list(repo, revision)
        names = [name for name in found.files if any(fnmatchcase(name, p) for p in patterns)]
        if not names:
            raise found.failure or EdgekvError(f"holds no {' or '.join(patterns)}; it holds {_listed(found.files)}")
        size = sum(found.files[name].size for name in names)
        if max_bytes is not None and size > max_bytes:
            raise EdgekvError(f"holds {size / 2**30:,.2f} GiB of {' and '.join(patterns)}: too much for what is asked of it; "
                              "is it the right name?")
        return _fetch(repo, revision, found, sorted(names, key=lambda name: found.files[name].size))


def file(repo_id: str, name: str) -> Path:
    """One file of a repository, in the cache. EdgekvError if there is none, or if it cannot be fetched."""
    repo, revision = _split(repo_id)
    with _one_line(f"{repo_id}/{name}"):
        return _fetch(repo, revision, _list(repo, revision), [name]) / name


def checkpoint(repo_id: str) -> Path:
    """The folder of a checkpoint in the cache, with what it takes to convert it or to load it with transformers.

    That is :data:`CHECKPOINT_PATTERNS` and the weights, as safetensors if there are any; not what lies in folders (the
    same weights for other programs). EdgekvError if it holds no checkpoint, or if it cannot be fetched.
    """
    repo, revision = _split(repo_id)
    with _one_line(repo_id):
        found = _list(repo, revision)
        ours = [name for name in found.files if not any(fnmatchcase(name, p) for p in OTHER_WEIGHTS)]
        weights = next(filter(None, (_matching(ours, [p]) for p in WEIGHTS)), [])
        if "config.json" not in found.files or not weights:
            raise found.failure or EdgekvError(_no_checkpoint(found.files))
        # the weights last: where they are, the rest is, which counts when the hub is out of reach
        others = [name for name in _matching(found.files, CHECKPOINT_PATTERNS) if name not in weights]
        shards = dict.fromkeys(part for name in weights for part in _parts(name))
        return _fetch(repo, revision, found, [*others, *shards])


def gguf(text: str) -> Path:
    """The GGUF file of ``hf:ORG/REPO/FILE.gguf``, ``hf:ORG/REPO:QUANT`` or ``hf:ORG/REPO``, in the cache.

    QUANT (``Q4_K_M``, in either case) picks the one file whose name holds it; without it the repository must hold one
    GGUF file. Of a split model all parts are fetched, and the first is returned. EdgekvError if the name or the
    repository says otherwise, or if it cannot be fetched.
    """
    m = _NAME.fullmatch(text)
    if m is None or not text.startswith("hf:") or m["file"] and not m["file"].endswith(".gguf"):
        raise EdgekvError(f"{text}: not of the form hf:ORG/REPO/FILE.gguf, hf:ORG/REPO:QUANT or hf:ORG/REPO")
    with _one_line(text):
        found = _list(m["repo"], m["revision"])
        name = m["file"] or _pick(m["repo"], found, m["quantisation"])
        parts = _parts(name)
        if name != parts[0]:
            raise EdgekvError(f"is one part of {len(parts)}: name the first, {parts[0]}")
        return _fetch(m["repo"], m["revision"], found, parts) / name


@dataclass(frozen=True)
class _File:
    size: int         # bytes, as the hub says
    blob: str | None  # what the cache calls its contents


@dataclass(frozen=True)
class _Listing:
    """The files of a repository by name; if ``failure`` says why the hub cannot be asked, those in the cache."""

    files: dict[str, _File]
    failure: Exception | None = None


def _list(repo: str, revision: str | None) -> _Listing:
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as e:
        failure = e
    else:
        return _Listing({s.rfilename: _File(s.size or 0, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings})

    try:  # no patterns: the folder as it is, whatever it holds
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
    except Exception:
        raise failure from None
    return _Listing({path.relative_to(folder).as_posix(): _File(path.stat().st_size, None)
                     for path in sorted(folder.rglob("*")) if path.is_file()}, failure)


def _fetch(repo: str, revision: str | None, found: _Listing, names: Sequence[str]) -> Path:
    """The folder with ``names``, all of one commit."""
    from huggingface_hub import hf_hub_download

    missing = [name for name in names if name not in found.files]
    if missing:
        raise found.failure or EdgekvError(f"the repository lacks {_listed(missing)}; it holds {_listed(found.files)}")
    if found.failure is None:
        _check_space(repo, [found.files[name] for name in names])
    for name in names:
        path = hf_hub_download(repo, name, revision=revision, local_files_only=found.failure is not None)
        folder = Path(path).parents[name.count("/")]
        revision = folder.name  # the commit, whatever is pushed meanwhile
    return folder


def _check_space(repo: str, files: Sequence[_File]) -> None:
    """EdgekvError unless the disk has room for what is not in the cache: huggingface_hub warns and begins."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    needed = sum(f.size for f in files if f.blob is None or not (blobs / f.blob).exists())
    folder = next(p for p in (blobs, *blobs.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EdgekvError(f"{needed / 2**30:,.2f} GiB to fetch, but {folder} has {free / 2**30:,.2f} GiB left; "
                          "free some space, or set HF_HOME to a folder on a larger disk")


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern folder by folder: * does not match /."""
    return [n for n in names if any(n.count("/") == p.count("/") and fnmatchcase(n, p) for p in patterns)]


def _parts(name: str) -> list[str]:
    """The names of all parts of the file that ``name`` is a part of, in order; of a whole file its own."""
    m = _PART.fullmatch(name)
    if m is None or not int(m[3]):
        return [name]
    return [f"{m[1]}-{i + 1:05}-of-{m[3]}{m[4]}" for i in range(int(m[3]))]


def _pick(repo: str, found: _Listing, quantisation: str | None) -> str:
    """The one GGUF file of a repository, or the one of ``quantisation``; of a split one the first part."""
    models = [name for name in found.files if name.endswith(".gguf") and not OTHER_GGUF.match(name.rsplit("/", 1)[-1])
              and name == _parts(name)[0]]
    fits = models
    if quantisation is not None:
        # Q4_K is not Q4_K_M, and Q4_XS is not IQ4_XS
        wanted = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quantisation)}(?=[-.])", re.I)
        fits = [name for name in models if wanted.search(name.rsplit("/", 1)[-1])]
    if len(fits) == 1:
        return fits[0]
    if not fits and found.failure is not None:
        raise found.failure
    if not models:
        if "config.json" in found.files:
            raise EdgekvError(f"is a checkpoint without a GGUF file; run edgekv convert {repo} first")
        raise EdgekvError(f"holds no GGUF file; it holds {_listed(found.files)}")
    if quantisation is None:
        raise EdgekvError(f"holds {len(fits)} GGUF files; add :QUANT or /FILE.gguf to choose from {_listed(fits)}")
    if not fits:
        raise EdgekvError(f"no GGUF file has {quantisation} in its name; there are {_listed(models)}")
    raise EdgekvError(f"{len(fits)} GGUF files have {quantisation} in their names; add /FILE.gguf instead, one of "
                      f"{_listed(fits)}")


def _no_checkpoint(names: Sequence[str]) -> str:
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF files and no checkpoint; name one of them: hf:ORG/REPO:QUANT or hf:ORG/REPO/FILE.gguf"
    if "config.json" in names:
        return f"holds no weights ({' or '.join(WEIGHTS)}); it holds {_listed(names)}"
    return f"holds no checkpoint of transformers (config.json); it holds {_listed(names)}"


def _listed(names: Sequence[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """huggingface_hub without its warnings, and what it raises as an EdgekvError about ``what``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from huggingface_hub.utils import logging

            verbosity = logging.get_verbosity()
            logging.set_verbosity(logging.CRITICAL)
            try:
                yield
            finally:
                logging.set_verbosity(verbosity)
    except ImportError:
        raise EdgekvError("fetching from the Hugging Face hub needs the package huggingface_hub; "
                          "pip install huggingface_hub") from None
    except Exception as e:  # the package raises its HTTP library's errors, the system's and its own
        raise EdgekvError(f"{what}: {_reason(e)}") from None


def _reason(error: BaseException) -> str:
    """One line: why, and what to do. The first of the chain of causes that says something decides."""
    e: BaseException | None = error
    while e is not None:
        if isinstance(e, EdgekvError):
            return str(e)
        if getattr(e, "response", None) is not None:
            return _refusal(e.response)
        if type(e).__name__ == "OfflineModeIsEnabled":
            return "not in the cache, and HF_HUB_OFFLINE is set; unset it, or pass a local path"
        if isinstance(e, json.JSONDecodeError):
            return "what answers is not the hub; check HF_ENDPOINT and the proxy, or pass a local path"
        package = type(e).__module__.split(".")[0]  # of HTTP: it depends on the version of huggingface_hub
        if isinstance(e, (ConnectionError, TimeoutError)) or package in ("httpx", "httpx2", "requests"):
            return f"the hub cannot be reached: {_first_line(e)}; try again, or pass a local path"
        if isinstance(e, OSError) and e.errno is not None:
            where = f" ({e.filename})" if e.filename else ""
            return f"cannot be kept in the cache{where}: {e.strerror}; HF_HOME names another folder"
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return f"cannot be fetched: {_first_line(error).rstrip('.')}; try again, or pass a local path"


def _refusal(response) -> str:
    """What the hub's answer means."""
    code, message = response.headers.get("X-Error-Code"), response.headers.get("X-Error-Message") or ""
    if code == "EntryNotFound":
        return "no such file in the repository"
    if code == "RevisionNotFound":
        return "no such revision (branch, tag or commit) of the repository"
    if code == "GatedRepo":
        return "the model is gated: accept its terms on its page on the hub, and set HF_TOKEN"
    if message.startswith("Invalid credentials"):
        return "the hub does not know the token; check HF_TOKEN"
    if response.status_code in (401, 404):
        return "no such model on the hub, or it is private or gated: check the name, or set HF_TOKEN"
    if response.status_code == 403:
        return f"the hub refuses access ({_line(message) or 403}); check what the token in HF_TOKEN may read"
    if response.status_code == 429:
        return "the hub has had too many requests from here; try again later, or set HF_TOKEN"
    return f"the hub answers with status {response.status_code}; try again later, or pass a local path"


def _first_line(error: BaseException) -> str:
    return next(filter(None, map(_line, str(error).splitlines())), type(error).__name__)


def _line(text: str) -> str:
    return " ".join(text.split())
