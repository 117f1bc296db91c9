"""A ``Llama`` that writes down how its cache came about, so that a fresh context can be led the same way."""

from __future__ import annotations

import numpy as np

from edgekv import native
from edgekv.llama import Llama
from edgekv.session import CACHE_TYPES, Session


class Recorded(Llama):
    """``log``: the batches and cuts that made the cache what it is, whatever was tried in between."""

    def __init__(self, *args, **kwargs):
        self.log: list[tuple] = []
        self.n_keep: int | None = None
        self._logs: dict[int, list[tuple]] = {}
        super().__init__(*args, **kwargs)
        decode = self._ctx.decode

        def recorded(batch):
            raw = batch.batch
            n = raw.n_tokens
            self.log.append(("decode", [raw.token[i] for i in range(n)], raw.pos[0]))
            decode(batch)

        self._ctx.decode = recorded

    def set_keep(self, n_keep):
        super().set_keep(n_keep)
        self.n_keep = n_keep

    def _cut(self, n):
        super()._cut(n)
        self.log.append(("cut", n))

    def _save_boundaries(self):
        before = list(self.checkpoints)
        super()._save_boundaries()
        for checkpoint in self.checkpoints:
            if checkpoint not in before:
                self._logs[id(checkpoint)] = list(self.log)

    def _restore(self, checkpoint):
        done = super()._restore(checkpoint)
        self.log = list(self._logs[id(checkpoint)])
        return done

    def replayed(self, upto: int | None = None) -> Session:
        """A fresh context of the same settings, led through the log (or its first ``upto`` entries)."""
        names = {value: name for name, value in CACHE_TYPES.items()}
        p = self.context_params
        session = Session(self.model_path, n_ctx=p.n_ctx, n_ubatch=p.n_ubatch, n_batch=p.n_batch, n_threads=p.n_threads,
                          type_k=names[p.type_k], type_v=names[p.type_v], flash_attn=p.flash_attn_type == 1,
                          settings=self.eviction, filters=self.filters)
        if self.n_keep is not None:
            native.set_keep(session.ctx, self.n_keep)
        for kind, what, *where in self.log[:upto]:
            if kind == "cut":
                assert session.remove(what)
            else:
                session.decode(what, *where, logits="last")
        return session


def greedy(session: Session, first: np.ndarray, pos: int, n: int) -> list[int]:
    """``n`` tokens of the model's own choice behind what the session holds; ``first``: the logits it chooses from."""
    tokens, logits = [], first
    for i in range(n):
        tokens.append(int(np.argmax(logits[-1])))
        logits = session.decode(tokens[-1:], pos + i, logits="last")
    return tokens
