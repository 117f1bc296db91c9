"""What an evaluation compares: settings of the cache, swept as ``edgekv bench`` sweeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from edgekv.errors import EdgekvError
from edgekv.session import CACHE_TYPES
from edgekv.settings import EvictionSettings, SelectionSettings

NO_SELECTION = SelectionSettings("none")
# of a context that evicts nothing by itself: settings are applied to copies of a sequence, one after the other
ON_DEMAND = EvictionSettings("streaming", budget=8, mode="prompt")


@dataclass(frozen=True)
class Setting:
    """One setting. ``budget`` is as users write it: tokens, or ``x4`` for a quarter of what was read.

    Settings of the same ``cache`` share one reading of a text: they differ only in what is evicted from it and in what
    is read of it afterwards.
    """

    policy: str = "none"
    budget: str = ""
    window: int | None = None
    keep: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    selection: SelectionSettings = NO_SELECTION

    @property
    def cache(self) -> tuple[str, str]:
        return self.type_k, self.type_v

    @property
    def cache_name(self) -> str:
        return self.type_k if self.type_k == self.type_v else f"{self.type_k}/{self.type_v}"

    @property
    def method(self) -> str:
        """Policy, cache type and selection, without any budget: what is one curve in a picture."""
        parts = [] if self.policy == "none" else [self.policy]
        if self.cache != ("f16", "f16"):
            parts.append(self.cache_name)
        if self.selection.method != "none":
            parts.append(self.selection.method + (" per query head" if self.selection.per_query_head else ""))
        return ", ".join(parts) or "none"

    @property
    def label(self) -> str:
        """Unique among the settings of one evaluation, with what is not the default: ``none``, ``qfilters x4``,
        ``streaming 512 window 64 keep 8``, ``q8_0``, ``quest 256 page 32``."""
        parts = [] if self.policy == "none" else [f"{self.policy} {self.budget}"]
        for name, n in ("window", self.window), ("keep", self.keep):
            if parts and n is not None:
                parts[0] += f" {name} {n}"
        if self.cache != ("f16", "f16"):
            parts.append(self.cache_name)
        if self.selection.method != "none":
            s, usual = self.selection, SelectionSettings()
            parts.append(f"{s.method} {s.budget or 'auto'}"
                         + (f" page {s.page_size}" if s.page_size != usual.page_size else "")
                         + (f" dense {s.dense_layers}" if s.dense_layers != usual.dense_layers else "")
                         + (" per query head" if s.per_query_head else ""))
        return ", ".join(parts) or "none"

    def eviction(self, n_tokens: int, mode: str = "prompt") -> EvictionSettings:
        """For a text of ``n_tokens``. EdgekvError, naming the flag that is wrong."""
        return EvictionSettings.resolve(self.policy, self.budget or None, self.window, self.keep, mode, n_ctx=n_tokens)

    def compression(self, n_tokens: int) -> float:
        """Bytes of a full f16 cache of so many tokens / bytes of this one behind an eviction."""
        from edgekv.native import type_block

        tokens = n_tokens if self.policy == "none" else min(n_tokens, self.eviction(n_tokens).budget)
        blocks = [type_block(CACHE_TYPES[name]) for name in self.cache]
        bits = sum(n_bytes / n for n, n_bytes in blocks) / 4  # of f16's two times two bytes
        return n_tokens / tokens / bits


def plan(
    *,
    policies: Sequence[str] = ("none",),
    budgets: Sequence[str] = (),
    window: int | None = None,
    keep: int | None = None,
    types: Sequence[str] = ("f16",),
    selections: Sequence[SelectionSettings] = (NO_SELECTION,),
) -> list[Setting]:
    """Every combination once, the full f16 cache first: everything is compared with it. ``none`` has no budget. A cache
    type stands for K and V; other types than f16 are not combined with evictions, nor are selections.

    EdgekvError, naming the flag that is wrong.
    """
    for name in types:
        if name not in CACHE_TYPES:
            raise EdgekvError(f"-ctk {name}: unknown cache type, choose one of {', '.join(CACHE_TYPES)}")
    settings = [Setting()]
    for policy, budget in product([p for p in policies if p != "none"], budgets or ("",)):
        setting = Setting(policy, str(budget), window, keep)
        setting.eviction(1 << 30)  # says what is wrong with it
        settings.append(setting)
    settings += [Setting(type_k=name, type_v=name) for name in types if name != "f16"]
    settings += [Setting(selection=s) for s in selections if s.method != "none"]
    return list(dict.fromkeys(settings))
