"""Images and sound: what goes together, said before anything is loaded.

A multimodal model is two files: the language model, and the projector (mmproj), which makes embeddings of images or
sound. llama.cpp's libmtmd computes them, for llama-server and for the handlers of chats that the bindings have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from edgekv.errors import EdgekvError
from edgekv.gguf_file import Part


def is_projector(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a projector; what is no GGUF file is none."""
    try:
        return Part(path, header_only=True).is_projector
    except EdgekvError:
        return False


def check_projector(path: str | os.PathLike[str], flag: str) -> Part:
    """The header of a projector's file, named by ``flag``. EdgekvError if it is none."""
    try:
        part = Part(path)
    except EdgekvError as error:
        raise EdgekvError(f"{flag} {error}") from None
    if not part.is_projector:
        raise EdgekvError(f"{flag} {path}: is no projector of a multimodal model; give the file called mmproj that comes "
                          "with the model")
    return part


def refuse_eviction(what: str, eviction: str, instead: str = "drop one of them") -> EdgekvError:
    """Why ``what``, by which images or sound come into the cache, does not go with ``eviction``."""
    # going back to a checkpoint reads tokens again, and an image has none
    return EdgekvError(f"{what} does not go with {eviction}: a cache that holds images or sound cannot be evicted from; "
                       f"{instead}")


def projector_of(handler: Any) -> str | None:
    """The projector's file of one of the bindings' handlers of images (Llava15ChatHandler, ...); None of others."""
    return getattr(handler, "clip_model_path", None)


def check_handler(path: str, policy: str) -> None:
    """EdgekvError unless the bindings' handlers can use this projector on a cache with this policy."""
    if policy != "none":
        raise refuse_eviction("chat_handler", f"kv_evict={policy!r}")
    if check_projector(path, "chat_handler:").get("clip.has_vision_encoder") is not True:
        raise EdgekvError(f"chat_handler: {path}: has no encoder of images, and the bindings' handlers take no sound; "
                          f"edgekv serve MODEL --mmproj {path} does")


def why_not(log: Iterable[str]) -> str:
    """Why libmtmd did not take a projector, from lines of its log; a few words if it did not say."""
    log = list(log)
    for pattern in (r"failed to load model '.*?': (?:\w+: )?(.+)", r"error: (.+)"):
        for line in log:
            if match := re.search(pattern, line):
                return match[1]
    return "libmtmd refused it"


def kinds(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of the parts that contents of messages consist of, sorted: text, image_url, input_audio, ..."""
    parts = [part for message in messages for part in _parts(message)]
    return sorted({str(part.get("type")) if isinstance(part, dict) else "text" for part in parts})


def check_kinds(messages: Sequence[dict[str, Any]], known: Collection[str], advice: str) -> None:
    """EdgekvError with advice if a message has a part of a kind that would be dropped or become garbage."""
    for kind in kinds(messages):
        if kind not in known:
            raise EdgekvError(f"messages: a part of type {kind!r} cannot be read here; {advice}")


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with one text in the place of parts of text, as llama-server joins them."""
    return [{**message, "content": "\n".join(str(part.get("text", "") if isinstance(part, dict) else part)
                                             for part in _parts(message))}
            if _parts(message) else message for message in messages]


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []
