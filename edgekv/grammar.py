"""Grammars that answers must follow, checked before a model answers."""

from __future__ import annotations

import json
import os
import sys
import tempfile

from edgekv.errors import EdgekvError


def parse_grammar(text: str):
    """A ``LlamaGrammar`` of GBNF text; whether it parses shows in :func:`check`."""
    from edgekv import native  # noqa: F401  says which library the bindings load
    from llama_cpp import LlamaGrammar

    if not text.strip():
        raise EdgekvError("the grammar is empty")
    return LlamaGrammar.from_string(text, verbose=False)


def parse_json_schema(text: str):
    """A ``LlamaGrammar`` of a JSON schema. EdgekvError if it is none."""
    from edgekv import native  # noqa: F401
    from llama_cpp import LlamaGrammar

    try:
        json.loads(text)
    except ValueError as error:
        raise EdgekvError(f"is not JSON: {error}") from None
    try:
        return LlamaGrammar.from_json_schema(text, verbose=False)
    except Exception as error:  # whatever the converter stumbles over
        raise EdgekvError(f"is not a JSON schema that can be followed: {error}") from None


def check(llama, grammar) -> None:
    """EdgekvError, with the parser's own words, if a grammar cannot be followed."""
    import llama_cpp

    # the parser writes what it does not understand to standard error, from C
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as said:
        try:
            os.dup2(said.fileno(), 2)
            sampler = llama_cpp.llama_sampler_init_grammar(
                llama._model.vocab, grammar._grammar.encode(), grammar._root.encode())
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        said.seek(0)
        words = said.read().decode(errors="replace").split("\n")[0].removeprefix("parse: ")
    if not sampler:
        raise EdgekvError(f"the grammar cannot be parsed: {words or 'has it a rule named root?'}")
    llama_cpp.llama_sampler_free(sampler)
