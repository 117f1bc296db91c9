"""What a server did to its cache (EDGEKV_TRACE), done again by a context that no server drives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from edgekv import native
from edgekv.errors import EdgekvError
from edgekv.session import Session

import llama_cpp


class Replay:
    """A session that is led through a trace: the same batches, cuts, states and copies.

    What a slot holds is counted along, so a token at the wrong place, a hole, a cut that the cache cannot make or a
    state of something else is an AssertionError here, whatever the server believed.

    Args:
        session: as many sequences as the server has slots, and its settings.
        ignore_eos: whether the answers were asked for so.
    """

    def __init__(self, session: Session, trace: Iterable[dict], *, ignore_eos: bool = True):
        self.session = session
        self.held: dict[int, list[int]] = defaultdict(list)
        self._never = [t for t in range(session.n_vocab) if session.ends(t)] if ignore_eos else []
        self._states: dict[int, tuple[bytes, list[int]]] = {}
        # (slot, what it had read) -> what came next by the logits, once per time that they were computed
        self._next: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for event in trace:
            self._do(event)

    def _do(self, event: dict) -> None:
        if "decode" in event:
            self._decode(event["decode"])
            return
        slot = event["cut"] if "cut" in event else event["slot"]
        held = self.held[slot]
        if "cut" in event:
            n = max(event["to"], 0)
            assert n <= len(held), f"slot {slot} is cut to {n} tokens and has {len(held)}"
            assert self.session.remove(n, seq_id=slot), f"slot {slot} cannot be cut from {len(held)} to {n} tokens"
            del held[n:]
        elif "save" in event:
            self._states[event["save"]] = self.session.save(slot), list(held)
        elif "restore" in event:
            state, tokens = self._states[event["restore"]]
            self.session.load(state, slot)
            self.held[slot] = list(tokens)
        elif "keep" in event:
            native.set_keep(self.session.ctx, event["keep"], slot)
        elif "copy" in event:
            self.session.copy(event["copy"], slot)
            assert not native.last_error(), native.last_error()
            self.held[slot] = list(self.held[event["copy"]])
            if said := self._next.get((event["copy"], tuple(self.held[slot]))):  # both answers begin with these logits
                self._next[slot, tuple(self.held[slot])].append(said[-1])
        else:
            raise AssertionError(f"an event of no kind: {event}")

    def _decode(self, entries: Sequence[tuple[int, int, int, int]]) -> None:
        for slot, token, pos, _ in entries:
            held = self.held[slot]
            assert pos == len(held), f"slot {slot} reads position {pos} and has {len(held)} tokens"
            held.append(token)
        logits = decode_mixed(self.session, entries)
        logits[:, self._never] = -np.inf
        outputs = [(slot, pos) for slot, _, pos, output in entries if output]
        for (slot, pos), row in zip(outputs, logits):
            self._next[slot, tuple(self.held[slot][: pos + 1])].append(int(np.argmax(row)))

    def answer(self, slot: int, prompt: Sequence[int], n: int) -> list[int]:
        """The first ``n`` tokens of a slot's greedy answer to a prompt by these logits; a second call is about the
        second time that it was given. AssertionError if the slot never had the prompt and these tokens in the cache."""
        read = list(prompt)
        for i in range(n):
            said = self._next[slot, tuple(read)]
            assert said, f"slot {slot} never held the prompt of {len(prompt)} tokens and {read[len(prompt):]}"
            read.append(said.pop(0))
        return read[len(prompt) :]


def decode_mixed(session: Session, entries: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
    """One llama_decode of (sequence, token, position, whether logits are wanted); float32 [n wanted, n_vocab]."""
    batch = session._batch
    assert len(entries) <= session.n_batch, f"{len(entries)} tokens in a batch of {session.n_batch}"
    batch.n_tokens = len(entries)
    for i, (seq_id, token, pos, output) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, bool(output)
        batch.seq_id[i][0] = seq_id
    native.clear_error()
    code = llama_cpp.llama_decode(session.ctx, batch)
    if code != 0:
        raise EdgekvError(native.last_error() or f"llama_decode returned {code}")
    n = sum(bool(output) for *_, output in entries)
    if n == 0:
        return np.empty((0, session.n_vocab), np.float32)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(session.ctx), shape=(n, session.n_vocab)).copy()
