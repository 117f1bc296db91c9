"""Session files: a conversation and the state of its cache, to go on with in another process.

A safetensors file: ``tokens`` int32 and ``state`` uint8 (the runtime's own format, with settings and checksums inside);
in the metadata ``format``, ``version``, ``model_sha256`` (:func:`edgekv.filters.model_fingerprint`), ``messages`` as JSON,
``rope`` if positions were stretched (:class:`edgekv.settings.RopeSettings`), and ``sha256`` over tokens, state, messages,
model_sha256 and what there is of rope.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv import atomic
from edgekv.errors import EdgekvError

_LONE = re.compile("[\ud800-\udfff]")

FORMAT = "edgekv session"
VERSION = "1"


@dataclass
class SavedSession:
    """What a session file holds. ``tokens``: what the cache had read, int32; ``rope``: how its positions are stretched."""

    tokens: np.ndarray
    state: np.ndarray
    messages: list[dict]
    model_sha256: str
    rope: str = ""

    def _digest(self, messages: str) -> str:
        h = hashlib.sha256()
        parts = [self.tokens.astype("<i4").tobytes(), self.state.tobytes(), messages.encode(), self.model_sha256.encode()]
        if self.rope:
            parts.append(self.rope.encode())
        for part in parts:
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
        return h.hexdigest()

    def _fault(self) -> str:
        """What in it is not what a conversation goes on with: a checksum does not say who made it. Empty if all is."""
        if self.tokens.dtype != np.int32 or self.tokens.ndim != 1 or (self.tokens < 0).any():
            return "its tokens are no list of numbers"
        if self.state.dtype != np.uint8 or self.state.ndim != 1:
            return "its state is no list of bytes"
        if not isinstance(self.messages, list) or not all(map(_is_message, self.messages)):
            return "its messages are not those of a conversation"
        return ""

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. EdgekvError if it cannot be written."""
        from safetensors.numpy import save

        messages = json.dumps(self.messages, ensure_ascii=False)
        metadata = {"format": FORMAT, "version": VERSION, "model_sha256": self.model_sha256, "messages": messages,
                    "sha256": self._digest(messages)} | ({"rope": self.rope} if self.rope else {})
        tensors = {"tokens": np.ascontiguousarray(self.tokens, np.int32), "state": np.ascontiguousarray(self.state)}
        atomic.write(path, [save(tensors, metadata)])

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SavedSession:
        """Read a file. EdgekvError, naming it, if it is no session, of another version or damaged."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise EdgekvError(f"{path}: no such file")
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise EdgekvError(f"{path}: is not a session of edgekv")
                if metadata.get("version") != VERSION:
                    raise EdgekvError(f"{path}: is a session of format version {metadata.get('version')}, this edgekv "
                                      f"reads version {VERSION}")
                found = cls(file.get_tensor("tokens"), file.get_tensor("state"), json.loads(metadata["messages"]),
                            metadata["model_sha256"], metadata.get("rope", ""))
        except OSError as e:
            raise EdgekvError(f"{path}: cannot be read: {e.strerror or e}") from None
        # a type that NumPy has not is none of safetensors' own errors
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
            raise EdgekvError(f"{path}: is not a session of edgekv, or damaged ({type(e).__name__})") from None
        if fault := found._fault():
            raise EdgekvError(f"{path}: is damaged: {fault}")
        if found._digest(metadata["messages"]) != metadata.get("sha256"):
            raise EdgekvError(f"{path}: is damaged: its checksum does not match")
        return found


def _is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    role, content = message.get("role"), message.get("content")
    # a lone surrogate, which JSON can hold, is no text
    return role in ("system", "user", "assistant") and isinstance(content, str) and not _LONE.search(content)
