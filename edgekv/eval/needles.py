"""Runs documents with needles on the shipped runtime: each is read once, and every setting is asked about it.

The question is hidden from the compression: the document is cached exactly, copied, evicted once in the copy, and
only then asked (the papers' way; ``mode="prompt"``). With ``mode="bounded"`` the cache is bounded while the document is
read, as it is in use; every setting reads it for itself then. Answers are greedy.

Selection works on decode steps, so with it the question is read in steps of at most eight tokens too: read as a prompt,
the needle would be found before anything is selected.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from edgekv.attention import DECODE_TOKENS
from edgekv.errors import EdgekvError
from edgekv.eval.journal import Journal
from edgekv.eval.report import Score
from edgekv.eval.setting import NO_SELECTION, ON_DEMAND, Setting
from edgekv.eval.tasks import Document, Question
from edgekv.filters import QFilters
from edgekv.progress import bar
from edgekv.session import Session
from edgekv.settings import MODES, EvictionSettings, SelectionSettings, needs_queries

N_UBATCH = 512
N_UBATCH_BOUNDED = 64  # room for a question and its answer behind the budget, so that they evict nothing


@dataclass(frozen=True)
class _Group:
    """Settings that share one reading of a document; ``name`` is unique among the groups of an evaluation."""

    name: str
    type_k: str
    type_v: str
    settings: tuple[Setting, ...]
    own: EvictionSettings | None  # of the context
    tap: bool = False


def groups(settings: Sequence[Setting], mode: str, length: int) -> list[_Group]:
    """What is read how often: every cache type once, selections on it from one reading, evictions from one; with
    ``bounded`` each eviction by itself."""
    found = []
    for (type_k, type_v), same in groupby(sorted(settings, key=lambda s: s.cache), key=lambda s: s.cache):
        same = tuple(same)
        evicting = tuple(s for s in same if s.policy != "none")
        plain = tuple(s for s in same if s.policy == "none" and s.selection == NO_SELECTION)
        selecting = tuple(s for s in same if s.selection != NO_SELECTION)
        name = same[0].cache_name
        if mode == "bounded":
            if plain:
                found.append(_Group(name, type_k, type_v, plain, None))
            found += [_Group(s.label, type_k, type_v, (s,), s.eviction(length, mode)) for s in evicting]
        elif plain or evicting:
            tap = any(needs_queries(s.policy) for s in evicting)
            found.append(_Group(name, type_k, type_v, plain + evicting, ON_DEMAND if evicting else None, tap))
        if selecting:
            found.append(_Group(f"{name} selected", type_k, type_v, selecting, None))
    return found


def run(
    path: str | os.PathLike[str],
    documents: Iterable[Document],
    settings: Sequence[Setting],
    journal: Journal,
    *,
    filters: QFilters | None = None,
    mode: str = "prompt",
    n_threads: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """Ask a model about documents under every setting.

    Args:
        documents: see :mod:`edgekv.eval.tasks`; their lengths include the question.
        settings: with the full cache among them, if anything is to be compared with it.
        journal: gets a record per document and reading; what it has already is not run again.
        filters: for policies that need them.
        mode: see the module's documentation.

    Raises:
        EdgekvError: the model cannot be loaded or evicted from, a setting does not fit, the journal cannot be written.
    """
    if mode not in MODES:
        raise EdgekvError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    labels = [s.label for s in settings]
    for s in settings:
        if s.policy != "none" and s.selection != NO_SELECTION:
            raise EdgekvError(f"{s.label}: an eviction and a selection are judged one by one, not together")
        if labels.count(s.label) > 1:
            raise ValueError(f"two settings are called {s.label!r}")
    documents = list(documents)
    lengths = sorted({document.length for document in documents})
    by_length = {length: groups(settings, mode, length) for length in lengths}

    jobs = []  # (group, document, journal's key), those of one context together
    for length in lengths:
        for group in by_length[length]:
            jobs += [(group, d, f"{d.key} | {group.name}") for d in documents if d.length == length]
    missing = [job for job in jobs if job[2] not in journal.done]

    with bar("asking", sum(d.length for _, d, _ in missing), unit="tokens", show=progress) as advance:
        for (group, length), same in groupby(missing, key=lambda job: (job[0], job[1].length)):
            with _Asker(path, group, length, filters, n_threads) as asker:
                for _, document, key in same:
                    journal.add(key, asker.record(document))
                    advance(document.length)
    return [score for group, document, key in jobs for score in _scores(group, document, journal.done[key])]


def _scores(group: _Group, document: Document, record: dict) -> Iterable[Score]:
    """A record as the report takes it."""
    for setting in group.settings:
        compression = _compression(setting, record["n_tokens"])
        for task, answer in record["answers"][setting.label].items():
            yield Score(document.key, document.length, task, document.depth, setting.label, setting.method, compression,
                        answer["score"])


def _compression(setting: Setting, n_tokens: int) -> float:
    """How many times smaller the cache is; with a selection, of how many times fewer tokens a step reads."""
    from edgekv.native import auto_budget

    if setting.selection == NO_SELECTION:
        return setting.compression(n_tokens)
    return n_tokens / min(n_tokens, setting.selection.budget or auto_budget(n_tokens))


class _Asker:
    """A context, and one more for each selection, for one group at one length."""

    def __init__(self, path, group: _Group, length: int, filters: QFilters | None, n_threads: int | None):
        self.group, self.filters = group, filters
        self.shared = group.own is ON_DEMAND
        self.bounded = group.own is not None and not self.shared
        n_ctx = length + 512  # the longest answers, of RULER's variables
        common = dict(n_ctx=n_ctx, n_ubatch=N_UBATCH_BOUNDED if self.bounded else N_UBATCH, n_threads=n_threads,
                      flash_attn=True, type_k=group.type_k, type_v=group.type_v)
        self.session = Session(path, n_seq_max=2 if self.shared else 1, settings=group.own,
                               filters=filters if self.bounded else None, tap_queries=group.tap, **common)
        self.n_begin = len(self.session.tokenize(""))
        self.selecting: dict[SelectionSettings, Session] = {}
        try:
            for s in group.settings:
                if s.selection != NO_SELECTION:
                    self.selecting[s.selection] = Session(path, selection=s.selection, **common)
        except BaseException:
            self.close()
            raise

    def record(self, document: Document) -> dict:
        """The answers under every setting, and their scores."""
        self.tokens = self.session.tokenize(document.text)
        self._read()
        self.state = self.session.save() if self.selecting else b""
        questions = [(question, *self._tokens(question)) for question in document.questions]

        answers = {}
        for s in self.group.settings:
            self._fresh = False
            answers[s.label] = found = {}
            for question, asked, draft in questions:
                text = self._answer(s, question, asked, draft)
                found[question.task] = {"score": question.score(text), "text": text}
        return {"n_tokens": len(self.tokens), "answers": answers}

    def _read(self) -> None:
        self.session.clear()
        self.session.read(self.tokens)
        if self.bounded and self.session.stats().cells_used > self.group.own.budget:
            self.session.evict()  # to what the label says; on the way there are up to a ubatch more
        self._n_evictions = self.session.stats().n_evictions

    def _tokens(self, question: Question) -> tuple[list[int], list[int]]:
        """What is asked, and a draft of the answer."""
        asked = self.session.tokenize(question.asked)[self.n_begin :]
        if not self.selecting and len(question.answers) == 1:
            both = self.session.tokenize(f"{question.asked} {question.answers[0]}")[self.n_begin :]
            if both[: len(asked)] == asked and len(both) <= self.session.n_batch:
                return asked, both[len(asked) :][: question.n_predict]
        return asked, []

    def _answer(self, s: Setting, question: Question, asked: list[int], draft: list[int]) -> str:
        n = len(self.tokens)
        step = DECODE_TOKENS if self.selecting else self.session.n_batch
        here, seq_id = self._ready(s)
        text = answer(here, seq_id, n, asked, question, draft, step)
        if text is None:  # the cache cannot go back to where the draft was wrong: a hybrid's
            self._fresh = False
            here, seq_id = self._ready(s)
            text = answer(here, seq_id, n, asked, question, [], step)
        return text

    def _ready(self, s: Setting) -> tuple[Session, int]:
        """A sequence that holds the document as the setting has it, and nothing behind it."""
        n = len(self.tokens)
        here, seq_id = self.selecting.get(s.selection, self.session), int(self.shared)
        same = self._fresh and (not self.bounded or here.stats().n_evictions == self._n_evictions)
        if not (same and here.remove(n, seq_id=seq_id)):
            if here is not self.session:
                here.clear()
                here.load(self.state)
            elif self.shared:
                here.remove(0, seq_id=1)
                here.copy(0, 1)
                if s.policy != "none":
                    here.evict_as(s.eviction(n), self.filters, seq_id=1)
            elif here.stats().tokens_seen != n:
                self._read()
        self._fresh = True
        return here, seq_id

    def close(self) -> None:
        for session in (self.session, *self.selecting.values()):
            session.close()

    def __enter__(self) -> _Asker:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()


def answer(session: Session, seq_id: int, pos: int, asked: Sequence[int], question: Question, draft: Sequence[int],
           step: int) -> str | None:
    """The greedy continuation behind ``asked``: the rest of the line, ``n_predict`` tokens at most, no further than
    where everything is found.

    The question is read ``step`` tokens at a time. A ``draft`` is read along with it, all in one step: where the model
    agrees, its tokens need no steps of their own. None if the cache cannot be cut back to where it does not.
    """
    tokens = [*asked, *draft]
    for i in range(0, len(tokens), step):
        last = i + step >= len(tokens)
        logits = session.decode(tokens[i : i + step], pos + i, seq_id, logits=1 + len(draft) if last else "none")
    chosen = [int(t) for t in logits.argmax(axis=-1)]
    agreed = 0
    while agreed < len(draft) and chosen[agreed] == draft[agreed]:
        agreed += 1
    if agreed < len(draft) and not session.remove(pos + len(asked) + agreed, seq_id=seq_id):
        return None

    made = list(draft[:agreed])
    token = chosen[agreed]
    while True:
        text, more = session.text(made), session.text([*made, token])
        new = more[len(text):]
        whole = not new[:1].isalnum()  # the word before it is complete
        full = len(made) >= question.n_predict
        if full or session.ends(token) or "\n" in new or (whole and question.score(text) == 1):
            return text.strip()
        made.append(token)
        token = int(session.decode([token], pos + len(asked) + len(made) - 1, seq_id, logits="last")[0].argmax())
