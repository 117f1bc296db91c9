"""What to evict and down to what: the settings of a context, as users write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgekv.errors import EdgekvError

POLICIES = ("none", "qfilters", "streaming", "knorm", "keydiff")
MODES = ("bounded", "prompt")

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


@dataclass(frozen=True)
class EvictionSettings:
    """Eviction of one context, resolved to tokens.

    Attributes:
        policy: one of ``POLICIES``.
        budget: cached tokens per sequence and KV head after an eviction.
        window: the last tokens, always kept.
        keep: the first tokens, always kept (the attention sinks are among them).
        mode: ``bounded`` evicts by itself and allocates ``budget + n_ubatch`` cells; ``prompt`` allocates the whole
            context and evicts when :meth:`edgekv.Llama.evict` is called.
    """

    policy: str = "none"
    budget: int = 0
    window: int = 0
    keep: int = 4
    mode: str = "bounded"

    @classmethod
    def resolve(
        cls,
        policy: str = "none",
        budget: int | str | None = None,
        window: int | None = None,
        keep: int | None = None,
        mode: str = "bounded",
        *,
        n_ctx: int,
        bytes_per_token: int = 0,
    ) -> EvictionSettings:
        """Check what the user wrote and turn it into tokens.

        Args:
            budget: tokens (``2048``), a share of the context (``x8`` is n_ctx / 8) or a size (``1.5GiB``).
            n_ctx: tokens of context.
            bytes_per_token: K and V of one token in all layers, for a budget in bytes.

        Raises:
            EdgekvError: naming the flag that is wrong.
        """
        if policy not in POLICIES:
            raise EdgekvError(f"--kv-evict {policy}: unknown policy, choose one of {', '.join(POLICIES)}")
        if mode not in MODES:
            raise EdgekvError(f"kv_evict_mode {mode}: choose one of {', '.join(MODES)}")
        if policy == "none":
            return cls()
        if budget is None:
            raise EdgekvError(f"--kv-evict {policy} needs --kv-budget (tokens, x8 or 1.5GiB)")

        tokens = parse_budget(budget, n_ctx=n_ctx, bytes_per_token=bytes_per_token)
        # a default gives way to a small budget, a wish is an error below
        keep_tokens = min(4, tokens) if keep is None else keep
        window_tokens = min(256, tokens // 4, tokens - keep_tokens) if window is None else window

        for flag, value in (("--kv-window", window_tokens), ("--keep", keep_tokens)):
            if value < 0:
                raise EdgekvError(f"{flag} {value}: must not be negative")
        if keep_tokens + window_tokens > tokens:
            raise EdgekvError(
                f"--keep {keep_tokens} and --kv-window {window_tokens} exceed --kv-budget {tokens}: "
                "raise the budget or lower them"
            )
        return cls(policy, tokens, window_tokens, keep_tokens, mode)


def parse_budget(text: int | str, *, n_ctx: int, bytes_per_token: int = 0) -> int:
    """Tokens that a budget means.

    Raises:
        EdgekvError: not a budget, or less than one token.
    """
    text = str(text).strip()
    error = EdgekvError(f"--kv-budget {text}: give tokens (2048), a share of the context (x8) or a size (1.5GiB)")

    if len(text) > 20:
        raise error
    if match := re.fullmatch(r"-?\d+", text):
        tokens = int(text)
    elif match := re.fullmatch(r"[xX](\d+(?:\.\d+)?)", text):
        share = float(match[1])
        if share < 1:
            raise error
        tokens = int(n_ctx / share)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgKMG]i?)?[bB]", text):
        if bytes_per_token <= 0:
            raise EdgekvError(f"--kv-budget {text}: a size in bytes is not known for this model, give tokens")
        tokens = int(float(match[1]) * _UNITS[(match[2] or "").lower()] / bytes_per_token)
    else:
        raise error

    if tokens < 1:
        raise EdgekvError(f"--kv-budget {text}: must leave at least 1 token")
    if tokens > 2**31 - 1:
        raise EdgekvError(f"--kv-budget {text}: too large")
    return tokens
