"""What stays in the cache and what a decode step reads: the settings of a context, as users write them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace

from edgekv.errors import EdgekvError

POLICIES = ("none", "kvdiff+qfilters+recency", "kvdiff", "qfilters", "qfilters+keydiff", "keydiff", "knorm", "snapkv",
            "streaming", "random")
MODES = ("bounded", "prompt")
SELECTIONS = ("none", "quest")
PAGE_SIZES = (8, 16, 32, 64)
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
FLOAT_TYPES = CACHE_TYPES[:3]  # the others are quantised, and V of such a type needs flash attention

# the default where something has to be evicted: see docs/quality.md
DEFAULT_POLICY = "kvdiff+qfilters+recency"


def needs_filters(policy: str) -> bool:
    """Whether a policy looks at the model's Q-Filters."""
    return "qfilters" in policy.split("+")


def needs_queries(policy: str) -> bool:
    """Whether a policy looks at the queries of the last tokens."""
    return policy == "snapkv"


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
        window_tokens = max(0, min(256, tokens // 4, tokens - keep_tokens)) if window is None else window

        for flag, value in (("--kv-window", window_tokens), ("--keep", keep_tokens)):
            if value < 0:
                raise EdgekvError(f"{flag} {value}: must not be negative")
        if keep_tokens + window_tokens > tokens:
            raise EdgekvError(
                f"--keep {keep_tokens} and --kv-window {window_tokens} exceed --kv-budget {tokens}: "
                "raise the budget or lower them"
            )
        return cls(policy, tokens, window_tokens, keep_tokens, mode)


@dataclass(frozen=True)
class SelectionSettings:
    """Selection of one context: what a decode step reads of the tokens in the cache. Nothing is deleted.

    Attributes:
        method: one of ``SELECTIONS``; ``quest`` is Quest (arXiv 2406.10774), pages chosen per KV head.
        budget: tokens read per step and KV head, rounded up to pages; 0: 768 and a 32nd of the cached tokens
            (``llama_edgekv_auto_budget``).
        page_size: tokens per page, one of ``PAGE_SIZES``.
        dense_layers: the first layers of the model, which read the whole cache.
        grouped_attention: steps that do not select read the cache with our attention kernel, each row once for all query
            heads of its KV head: faster than the stock one, equal but for the last bits. The dense layers of a step that
            selects are read so anyway.
        per_query_head: choose pages for each query head by itself, as the paper does, instead of once for all query heads
            of a KV head. For comparisons: K and V are read once per query head then.
    """

    method: str = "quest"
    budget: int = 0
    page_size: int = 16
    dense_layers: int = 2
    grouped_attention: bool = False
    per_query_head: bool = False

    @classmethod
    def resolve(
        cls,
        method: str = "none",
        budget: int | str | None = None,
        page_size: int | None = None,
        dense_layers: int | None = None,
        grouped_attention: bool = False,
        per_query_head: bool = False,
    ) -> SelectionSettings:
        """Check what the user wrote.

        Args:
            budget: tokens, or ``auto`` (the default).

        Raises:
            EdgekvError: naming the flag that is wrong.
        """
        if method not in SELECTIONS:
            raise EdgekvError(f"--kv-select {method}: unknown, choose one of {', '.join(SELECTIONS)}")
        if method == "none":
            for flag, value in (("--kv-select-budget", budget), ("--kv-page-size", page_size),
                                ("--kv-dense-layers", dense_layers)):
                if value is not None:
                    raise EdgekvError(f"{flag} is for selection: add --kv-select quest or drop it")
            return cls("none", grouped_attention=grouped_attention)

        page_size = 16 if page_size is None else page_size
        if page_size not in PAGE_SIZES:
            raise EdgekvError(f"--kv-page-size {page_size}: choose one of {', '.join(map(str, PAGE_SIZES))}")
        text = "auto" if budget is None else str(budget).strip()
        if text == "auto":
            tokens = 0
        elif text.isascii() and text.isdigit() and len(text) <= 10:
            tokens = int(text)
            if tokens < 2 * page_size:
                raise EdgekvError(f"--kv-select-budget {text}: must be two pages at least, {2 * page_size} tokens: the "
                                  "first and the newest page are always read")
            if tokens > 2**31 - 1:
                raise EdgekvError(f"--kv-select-budget {text}: too large")
        else:
            raise EdgekvError(f"--kv-select-budget {text}: give a number of tokens, or auto")
        layers = 2 if dense_layers is None else dense_layers
        if layers < 0:
            raise EdgekvError(f"--kv-dense-layers {layers}: must not be negative")
        return cls(method, tokens, page_size, layers, grouped_attention, per_query_head)

    @property
    def needs_flash_attention(self) -> bool:
        """Our kernels read V as rows, which is how the cache stores it with flash attention."""
        return self.method != "none" or self.grouped_attention

    def __str__(self) -> str:
        if self.method == "none":
            return "none, grouped attention" if self.grouped_attention else "none"
        return f"{self.method} {self.budget or 'auto'}, pages of {self.page_size}, {self.dense_layers} dense layers"


# as llama.cpp's enum llama_rope_scaling_type counts them
ROPE_SCALINGS = {"none": 0, "linear": 1, "yarn": 2}


@dataclass(frozen=True)
class RopeSettings:
    """How positions are stretched, so that a model reads more than it was trained on; the defaults are the model's own.

    The attributes are those of ``llama_context_params`` without their ``rope_`` and ``yarn_``; see :meth:`params`.
    """

    scaling_type: int = -1
    freq_base: float = 0.0
    freq_scale: float = 0.0
    ext_factor: float = -1.0
    attn_factor: float = -1.0
    beta_fast: float = -1.0
    beta_slow: float = -1.0
    orig_ctx: int = 0

    @classmethod
    def resolve(
        cls,
        rope_scaling: str | None = None,
        rope_scale: float | None = None,
        rope_freq_base: float | None = None,
        rope_freq_scale: float | None = None,
        yarn_orig_ctx: int | None = None,
        yarn_ext_factor: float | None = None,
        yarn_attn_factor: float | None = None,
        yarn_beta_slow: float | None = None,
        yarn_beta_fast: float | None = None,
    ) -> RopeSettings:
        """Check what the user wrote, under the names of llama.cpp's flags.

        Args:
            rope_scale: how many times longer the context becomes; ``1 / rope_freq_scale``.

        Raises:
            EdgekvError: naming the flag that is wrong, or two that do not go together.
        """
        if rope_scaling not in (None, *ROPE_SCALINGS):
            raise EdgekvError(f"--rope-scaling {rope_scaling}: choose one of {', '.join(ROPE_SCALINGS)}")
        for flag, value in (("--rope-scale", rope_scale), ("--rope-freq-base", rope_freq_base),
                            ("--rope-freq-scale", rope_freq_scale), ("--yarn-orig-ctx", yarn_orig_ctx)):
            # what a float32 holds
            if value is not None and not 1e-30 < value < 1e30:
                raise EdgekvError(f"{flag} {value}: must be a number above 0")
        factors = {"ext_factor": yarn_ext_factor, "attn_factor": yarn_attn_factor, "beta_fast": yarn_beta_fast,
                   "beta_slow": yarn_beta_slow}
        for name, value in factors.items():
            if value is not None and not 0 <= value < 1e30:  # llama.cpp takes negative ones for the model's own
                raise EdgekvError(f"--yarn-{name.replace('_', '-')} {value}: must be a number, 0 or above")
        if rope_scale is not None and rope_freq_scale is not None:
            raise EdgekvError("--rope-scale and --rope-freq-scale say the same, one is 1 over the other: drop one of them")
        if rope_scaling == "none" and (rope_scale or rope_freq_scale):
            raise EdgekvError(f"--rope-scaling none stretches nothing: drop it, or --rope-{'scale' if rope_scale else 'freq-scale'}")
        if rope_scaling != "yarn":
            for flag, value in (("orig-ctx", yarn_orig_ctx), *((n.replace("_", "-"), v) for n, v in factors.items())):
                if value is not None:
                    raise EdgekvError(f"--yarn-{flag} needs --rope-scaling yarn")
        return cls(-1 if rope_scaling is None else ROPE_SCALINGS[rope_scaling], rope_freq_base or 0.0,
                   1 / rope_scale if rope_scale else rope_freq_scale or 0.0,
                   **{name: -1.0 if value is None else value for name, value in factors.items()},
                   orig_ctx=yarn_orig_ctx or 0)

    def params(self) -> dict[str, float]:
        """Fields of ``llama_context_params``, and arguments of ``llama_cpp.Llama``, for what is not the model's own."""
        rope = ("scaling_type", "freq_base", "freq_scale")
        return {f"{'rope' if name in rope else 'yarn'}_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, params) -> RopeSettings:
        """Those of ``llama_context_params``, but for YaRN's factors where YaRN was not asked for: llama.cpp and the
        bindings have other values for none."""
        found = cls(params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale)
        if found.scaling_type != ROPE_SCALINGS["yarn"]:
            return found
        return replace(found, **{name: getattr(params, f"yarn_{name}")
                                 for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "orig_ctx")})

    def reach(self, n_ctx: int, factor: float = 1.0) -> int:
        """The context that these settings stretch a model to.

        Args:
            n_ctx: what its header says it was trained on, with the header's own scaling.
            factor: that of the header's scaling, in whose place a scale given here comes.
        """
        if not self.freq_scale:
            return n_ctx
        return math.floor((self.orig_ctx or n_ctx / factor) / self.freq_scale + 1e-3)

    def __str__(self) -> str:
        default = asdict(RopeSettings())
        names = {number: name for name, number in ROPE_SCALINGS.items()}
        return ", ".join(f"{name} {names[value] if name == 'scaling_type' else format(value, 'g')}"
                         for name, value in asdict(self).items() if value != default[name])


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
