"""A conversation with a model: messages, answers in pieces, going back, documents, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from edgekv import native
from edgekv.errors import EdgekvError
from edgekv.filters import model_fingerprint
from edgekv.gguf_file import GGUF
from edgekv.llama import Llama
from edgekv.session_file import SavedSession
from edgekv.settings import RopeSettings

_BEHIND_A_DOCUMENT = "\n\n"


class Conversation:
    """Turns between a user and a model.

    Args:
        system: system prompt; it is pinned in the cache as far as the budget allows, unless ``pin`` is off.
        sampling: arguments for ``create_chat_completion``; may be changed between turns.

    Raises:
        EdgekvError: the model has no chat template, or one that takes no system prompt.
    """

    def __init__(self, llama: Llama, *, system: str | None = None, pin: bool = True, sampling: dict | None = None):
        if not has_template(llama):
            raise EdgekvError(f"{llama.model_path}: has no chat template, so it cannot chat; try `edgekv run`")
        self.llama = llama
        self.sampling = sampling or {}
        self.messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
        self._document: str | None = None
        #: tokens of the system prompt that the budget has no room for
        self.unpinned = pin_system_prompt(llama, self.messages) if pin else 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. What has come when the iteration is left, or interrupted, stays as the answer; without
        any, the question is forgotten.

        Raises:
            EdgekvError: the conversation exceeds the context.
        """
        document, self._document = self._document, None
        content = text if document is None else document + _BEHIND_A_DOCUMENT + text
        self.messages.append({"role": "user", "content": content})
        try:
            yield from self._answer()
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
                self._document = document

    def regenerate(self) -> Iterator[str]:
        """Another answer to the last question, in place of the last one. EdgekvError if there is none."""
        if not self._ends_with_a_turn:
            raise EdgekvError("there is no answer yet that could be given again")
        old = self.messages.pop()
        try:
            yield from self._answer()
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.append(old)

    def undo(self) -> str:
        """Take the last question and its answer back; the question. EdgekvError if there is none."""
        if not self._ends_with_a_turn:
            raise EdgekvError("there is no turn that could be taken back")
        self.messages.pop()
        return self.messages.pop()["content"]

    @property
    def _ends_with_a_turn(self) -> bool:
        # a file that was loaded may have an answer without a question
        return [message["role"] for message in self.messages[-2:]] == ["user", "assistant"]

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._document = None

    def read(self, text: str) -> int:
        """Read a document now; the next question is asked behind it. Returns the tokens that were not read before.

        Raises:
            EdgekvError: it exceeds the context.
            KeyboardInterrupt: :meth:`edgekv.Llama.interrupt` was called; the document is not part of the conversation.
        """
        if self._document is not None:
            text = self._document + _BEHIND_A_DOCUMENT + text
        tokens = self.llama.document_tokens(self.messages, text + _BEHIND_A_DOCUMENT)
        reused = self.llama.read(tokens)
        self._document = text
        return len(tokens) - reused

    def _answer(self) -> Iterator[str]:
        answer = ""
        try:
            for chunk in self.llama.create_chat_completion(self.messages, stream=True, **self.sampling):
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    answer += piece
                    yield piece
        except ValueError as error:  # the bindings' own checks
            raise EdgekvError(f"{error}; take turns back, begin anew, or use a larger context") from None
        except RuntimeError as error:
            raise EdgekvError(native.last_error() or str(error)) from None
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and cache to a file. EdgekvError if it cannot be written."""
        llama = self.llama
        SavedSession(np.array(llama.input_ids[: llama.n_tokens], np.int32), native.save_state(llama.ctx), self.messages,
                     model_fingerprint(GGUF(llama.model_path)), self._rope()).write(path)

    def _rope(self) -> str:
        return str(RopeSettings.of(self.llama.context_params))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved conversation. EdgekvError, with nothing changed, if the file is damaged or was saved with
        another model or other settings of the cache."""
        saved, llama = SavedSession.read(path), self.llama
        if saved.model_sha256 != model_fingerprint(GGUF(llama.model_path)):
            raise EdgekvError(f"{path}: was saved with another model")
        if saved.rope != self._rope():
            there = saved.rope or "that of the model"
            raise EdgekvError(f"{path}: was saved with another RoPE scaling, {there}: give the same --rope-... options")
        if len(saved.tokens) > llama.n_ctx():
            raise EdgekvError(f"{path}: has {len(saved.tokens)} tokens, the context {llama.n_ctx()}: use a larger -c")
        try:
            llama.restore(saved.tokens, saved.state)
        except EdgekvError as error:
            raise EdgekvError(f"{path}: {error}") from None
        self.messages, self._document = saved.messages, None


def has_template(llama: Llama) -> bool:
    """Whether the model's file says how a chat is written."""
    return llama.chat_format is not None and "tokenizer.chat_template" in llama.metadata


def pin_system_prompt(llama: Llama, messages: list[dict]) -> int:
    """Keep what comes before the user's words, as far as the budget allows; the tokens that did not fit."""
    settings = llama.eviction
    if settings.policy == "none":
        return 0
    n = llama.system_tokens(messages)
    room = settings.budget - settings.window
    llama.set_keep(max(min(settings.keep, room), min(n, room)))
    return max(0, n - room)
