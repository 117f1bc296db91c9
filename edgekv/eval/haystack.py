"""Texts to hide needles in: the user's own, or prose that every Python installation has."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edgekv.errors import EdgekvError

Tokenize = Callable[[str], list[int]]

SKIPPED_FOLDERS = frozenset(
    "__pycache__ dist-packages encodings ensurepip idlelib lib2to3 site-packages test tests turtledemo".split()
)
SHORTEST_PROSE = 120  # characters
LONGEST = 500  # characters; a longer paragraph is divided, so that needles can go between
FEWEST = 2000  # characters of a haystack
SHARED_WORDS = 8  # in a row: a paragraph that shares so many with the calibration text is left out


@functools.lru_cache(maxsize=1)
def default_paragraphs() -> tuple[str, ...]:
    """English prose without a network: paragraphs of the standard library's docstrings, read with ``ast``, nothing
    imported; in the order of the files, long ones divided at ends of sentences. It depends on the Python version:
    :attr:`Haystack.sha256` tells.

    Filters are calibrated on the help topics (:func:`edgekv.calibrate.default_text`) and must not be evaluated on
    them: a paragraph that has eight words in a row in common with them (pdb's, mostly) is left out.

    EdgekvError if the installation has no sources.
    """
    from edgekv.calibrate import default_text

    calibrated_on = _runs(default_text())
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            continue
        for text in _docstrings(path):
            for part in re.split(r"\n\s*\n", text):
                paragraph = " ".join(part.split())
                if _is_prose(paragraph) and calibrated_on.isdisjoint(_runs(paragraph)):
                    found.update(dict.fromkeys(_divided(paragraph)))
    if sum(map(len, found)) < 20 * FEWEST:
        raise EdgekvError(f"{root}: lacks the standard library's sources; give texts of your own with -f")
    return tuple(found)


def paragraphs(files: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The paragraphs of UTF-8 texts, each once: what stands between blank lines, whitespace joined, long ones divided
    at ends of sentences.

    EdgekvError, naming the file, if one cannot be read, or if they are too short together.
    """
    from edgekv.calibrate import read_text

    files = [Path(file) for file in files]
    found: dict[str, None] = {}
    for file in files:
        for part in re.split(r"\n\s*\n", read_text(file)):
            found.update(dict.fromkeys(_divided(" ".join(part.split()))))
    length = sum(map(len, found))
    if length < FEWEST:
        names = ", ".join(map(str, files)) or "no file"
        raise EdgekvError(f"{names}: {length} characters are too few to hide needles in, at least {FEWEST} are needed")
    return tuple(found)


class Haystack:
    """Paragraphs, from which documents of any length are made.

    ``sha256`` is that of the paragraphs, joined by blank lines; it belongs into the record of an evaluation.
    """

    def __init__(self, paragraphs: Sequence[str]):
        self.paragraphs = tuple(paragraphs)
        if not self.paragraphs:
            raise ValueError("a haystack needs paragraphs")
        self.text = "\n\n".join(self.paragraphs)
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self._tokenize: Tokenize | None = None
        self._counts: dict[str, int] = {}

    @functools.cached_property
    def digits(self) -> str:
        """Every number in the text, in one line."""
        return " ".join(re.findall(r"\d+", self.text))

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Plain lower-case words of 4 to 9 letters, each once, in alphabetical order."""
        return tuple(sorted(set(re.findall(r"(?<![\w.-])[a-z]{4,9}(?![\w-])", self.text))))

    def fill(self, rng: random.Random, n_tokens: int, tokenize: Tokenize) -> list[str]:
        """Paragraphs in a random order, whose lines have ``n_tokens`` tokens or, by less than a word's, fewer; the last
        one is cut behind a word. If the text is too short it comes again, in a new order.

        Counts of whole paragraphs are kept as long as the same ``tokenize`` comes again.
        """
        filled: list[str] = []
        while n_tokens > 0:
            order = list(range(len(self.paragraphs)))
            rng.shuffle(order)
            for i in order:
                paragraph = self.paragraphs[i]
                n = self.count(paragraph, tokenize)
                if n > n_tokens:
                    return filled + ([cut] if (cut := _cut(paragraph, n_tokens, tokenize)) else [])
                filled.append(paragraph)
                n_tokens -= n
        return filled

    def count(self, paragraph: str, tokenize: Tokenize) -> int:
        """Tokens of one of the paragraphs as a line of its own."""
        if tokenize != self._tokenize:
            self._tokenize, self._counts = tokenize, {}
        if paragraph not in self._counts:
            self._counts[paragraph] = max(1, len(tokenize(paragraph + "\n")))
        return self._counts[paragraph]


def _docstrings(path: Path) -> list[str]:
    """Of a module, its classes and functions; none if it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, SyntaxError):
        return []
    for node in nodes:  # grows: statements only, a third faster than ast.walk
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _is_prose(paragraph: str) -> bool:
    return (
        len(paragraph) >= SHORTEST_PROSE
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and ">>>" not in paragraph
        and sum(c.isalpha() or c in " ,.'" for c in paragraph) >= 0.95 * len(paragraph)
    )


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every ``SHARED_WORDS`` words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def _divided(paragraph: str) -> list[str]:
    """Pieces of at most ``LONGEST`` characters: whole sentences, else words, else characters."""
    pieces = []
    while len(paragraph) > LONGEST:
        head = paragraph[: LONGEST + 1]
        ends = [match.start() for match in re.finditer(r"(?<=[.!?。！？]) |(?<=[。！？])", head)] or [head.rfind(" ")]
        at = ends[-1] if ends[-1] > 0 else LONGEST
        pieces.append(paragraph[:at].strip())
        paragraph = paragraph[at:].strip()
    return pieces + [paragraph] if paragraph else pieces


def _cut(paragraph: str, n_tokens: int, tokenize: Tokenize) -> str:
    """The most of a paragraph's words that fit, its characters where it has no spaces."""
    ends = [match.start() for match in re.finditer(" ", paragraph)]
    if len(ends) * 30 < len(paragraph):
        ends = list(range(1, len(paragraph)))
    low, high = 0, len(ends)  # the first `low` ends fit
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenize(paragraph[: ends[middle - 1]] + "\n")) <= n_tokens:
            low = middle
        else:
            high = middle - 1
    return paragraph[: ends[low - 1]] if low else ""
