"""Checkpoints of an evicted context: what makes going back cheap where the cache itself cannot go back.

After an eviction only a tail above the floor can be removed. A checkpoint is the state as it was right before an
eviction; it serves every prompt that shares its tokens up to some place at or above its own floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Checkpoint:
    """A saved state.

    Attributes:
        tokens: int32, what the context had read.
        floor: the state can be cut back to any position from here on.
        boundaries: the places for which it was made: ends of prompts, beginnings of messages.
        state: uint8, as :func:`edgekv.native.save_state` gives it.
    """

    tokens: np.ndarray
    floor: int
    boundaries: frozenset[int]
    state: np.ndarray

    def serves(self, tokens: np.ndarray) -> int:
        """How many of these tokens need not be read again: the shared ones, 0 if they end below the floor."""
        shared = common_prefix(self.tokens, tokens)
        return shared if shared == len(self.tokens) or shared >= self.floor else 0

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.state.nbytes


class Checkpoints:
    """Checkpoints in order of use, the least recently used first, together no larger than ``limit`` bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self._items: list[Checkpoint] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self):
        return iter(self._items)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self._items)

    def add(self, new: Checkpoint) -> bool:
        """Keep a checkpoint, at the expense of the least recently used ones; False if it is too large by itself.

        One of the same floor whose boundaries all lie in what the two share has nothing that the new one lacks.
        """
        if new.nbytes > self.limit:
            return False
        self._items = [old for old in self._items if not self._replaces(new, old)]
        self._items.append(new)
        while self.nbytes > self.limit:
            self._items.pop(0)
        return True

    @staticmethod
    def _replaces(new: Checkpoint, old: Checkpoint) -> bool:
        return new.floor <= old.floor and max(old.boundaries, default=0) <= common_prefix(new.tokens, old.tokens)

    def best(self, tokens: np.ndarray) -> tuple[Checkpoint | None, int]:
        """The checkpoint that saves most of reading these tokens, and how many it saves. Among equals the one that was
        evicted from least."""
        served = [(item.serves(tokens), -item.floor, item) for item in self._items]
        n, _, found = max(served, key=lambda x: x[:2], default=(0, 0, None))
        return (found, n) if n else (None, 0)

    def covers(self, tokens: np.ndarray, floor: int) -> bool:
        """Whether a prompt that begins with these tokens can go on from a checkpoint without reading any of them, and
        without more evictions than a state of this floor has seen."""
        return any(item.floor <= floor and item.serves(tokens) == len(tokens) for item in self._items)

    def touch(self, item: Checkpoint) -> None:
        """It was used."""
        self._items.remove(item)
        self._items.append(item)

    def drop(self, item: Checkpoint) -> None:
        self._items.remove(item)

    def clear(self) -> None:
        self._items.clear()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of tokens that two sequences begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
