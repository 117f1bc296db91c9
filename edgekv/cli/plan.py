"""``edgekv plan``"""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import click

from edgekv import plan as library
from edgekv.cli.common import format_bytes, model_option
from edgekv.errors import EdgekvError
from edgekv.settings import (
    CACHE_TYPES,
    DEFAULT_POLICY,
    FLOAT_TYPES,
    PAGE_SIZES,
    POLICIES,
    SELECTIONS,
    SelectionSettings,
    parse_budget,
)
from edgekv.table import markdown, to_json

SHARES = (4, 8, 16)  # of the context, budgets that are shown where nobody says which
MAX_CTX = 2**31 - 1


@click.command()
@model_option
@click.option("-c", "--ctx-size", "--ctx", "n_ctx", type=click.IntRange(min=1, max=MAX_CTX), metavar="N",
              help="Tokens of context, of all slots together [default: what the model was trained on].")
@click.option("--gpu", metavar="NAME|SIZE",
              help="A card or machine, rtx4060 or m4-24gb, or the size of a card, 8GiB [default: all in the table].")
@click.option("-ngl", "--gpu-layers", "--n-gpu-layers", "layers", type=click.IntRange(min=-1), metavar="N",
              help="Layers on the GPU, the last ones; -1: all, 0: plans for main memory [default: all].")
@click.option("-np", "--parallel", "n_parallel", type=click.IntRange(min=1, max=256), metavar="N",
              help="Slots of a server that share the context: plans for edgekv serve [default: for edgekv run].")
@click.option("-ctk", "--cache-type-k", "type_k", type=click.Choice(CACHE_TYPES),
              help="Type of K in the cache [default: f16, q8_0 and q4_0 are compared].")
@click.option("-ctv", "--cache-type-v", "type_v", type=click.Choice(CACHE_TYPES),
              help="Type of V in the cache [default: as -ctk; with it f16].")
@click.option("-fa", "--flash-attn", type=click.Choice(("on", "off", "auto")), default="auto", show_default=True,
              help="Flash attention. auto: on a GPU, for quantised V, and in a server.")
@click.option("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=1, max=1 << 20), default=512,
              show_default=True, metavar="N", help="Tokens computed at once.")
@click.option("--kv-evict", type=click.Choice(("auto", *POLICIES)), default="auto", show_default=True,
              help=f"Eviction policy; auto: {DEFAULT_POLICY}. none proposes no eviction.")
@click.option("--kv-budget", metavar="N|xN|SIZE",
              help="Tokens kept by an eviction [default: a few are shown, the largest that fits is proposed].")
@click.option("--kv-select", type=click.Choice(SELECTIONS), default="none", show_default=True,
              help="quest: every row with the summaries of its pages.")
@click.option("--kv-page-size", type=click.Choice([str(n) for n in PAGE_SIZES]), help="Tokens per page [default: 16].")
@click.option("--kv-dense-layers", type=click.IntRange(min=0), metavar="N",
              help="First layers without pages [default: 2].")
@click.option("-fitt", "--fit-target", type=click.IntRange(min=0), metavar="MIB",
              help="What stays free [default: 1024 of a card, a quarter of memory that the system shares].")
@click.option("--plot", metavar="FILE", type=click.Path(), help="Write the table as bars (.png or .svg).")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True,
              help="Format on standard output.")
def plan(model: str, gpu: str | None, fit_target: int | None, plot: str | None, output: str, **options: Any) -> None:
    """Work out what memory MODEL and its cache take, from the header of its file alone, and propose flags.

    Nothing is loaded; a file that was cut short behind its header will do.
    """
    from edgekv.gguf_file import GGUF

    if plot is not None:
        from edgekv.plot import check

        check(plot)
    device = None if gpu is None else library.find_device(gpu)
    found = library.read_model(GGUF(model, header_only=True))
    leave = None if fit_target is None else fit_target << 20
    facts = _Plan(found, device, leave, **options)
    if plot is not None:
        _plot(facts, plot)
    click.echo(to_json(facts.as_json()) if output == "json" else facts.as_text(), nl=False)


class _Plan:
    """Rows and proposals for one model. EdgekvError, naming the flag, if the options do not go together."""

    def __init__(self, model: library.Model, device: library.Device | None, leave: int | None, *, n_ctx: int | None,
                 layers: int | None, n_parallel: int | None, type_k: str | None, type_v: str | None, flash_attn: str,
                 n_ubatch: int, kv_evict: str, kv_budget: str | None, kv_select: str, kv_page_size: str | None,
                 kv_dense_layers: int | None):
        self.model, self.device, self.leave, self.server = model, device, leave, n_parallel is not None
        self.policy = DEFAULT_POLICY if kv_evict == "auto" else kv_evict
        if self.policy == "none" and kv_budget is not None:
            raise EdgekvError("--kv-budget says what an eviction keeps, but --kv-evict none evicts nothing: drop "
                              "one of them")
        if model.no_evict and (kv_evict not in ("auto", "none") or kv_budget is not None):
            raise EdgekvError(f"{model.path}: the cache cannot be evicted from: {model.no_evict}; --kv-evict none")
        if model.no_evict:
            self.policy = "none"
        n_ctx = n_ctx or model.n_ctx_train
        if not 0 < n_ctx <= MAX_CTX:
            raise EdgekvError(f"{model.path}: the header gives no sensible context length; give -c")
        quest = SelectionSettings.resolve(kv_select, None, kv_page_size and int(kv_page_size), kv_dense_layers)
        chosen = type_k or type_v
        types = [(type_k or "f16", type_v or "f16")] if chosen else [(name, name) for name in library.LADDER]
        if flash_attn == "off" and not chosen:
            types = types[:1]
        on_cpu, self.compare = layers == 0, layers is None
        if on_cpu and device is not None and device.kind == "discrete":
            raise EdgekvError(f"--gpu {device.name}: -ngl 0 puts nothing on a card; drop one of them")
        base = library.Setting(
            n_ctx, n_parallel or 1, n_ubatch, swa_full=False, n_gpu_layers=-1 if layers is None else layers,
            page_size=quest.page_size if quest.method != "none" else 0, dense_layers=quest.dense_layers)

        def make(names: tuple[str, str]) -> library.Setting:
            # the server's auto leaves it on wherever it works, ours where it is faster
            fa = flash_attn == "on" or flash_attn == "auto" and (
                self.server or not on_cpu or names[1] not in FLOAT_TYPES or bool(base.page_size))
            return replace(base, type_k=names[0], type_v=names[1], flash_attn=fa)

        self.notes = list(model.notes)
        self.caches = []
        for names in types:
            try:
                library.memory(model, make(names))
                self.caches.append(make(names))
            except EdgekvError as error:
                if chosen or names[1] in FLOAT_TYPES:
                    raise
                self.notes.append(str(error).removeprefix(f"{model.path}: "))
        if n_ctx // base.n_seq > model.n_ctx_train > 0:
            self.notes.append(f"{n_ctx // base.n_seq:,} tokens are more than the {model.n_ctx_train:,} that the model "
                              "was trained on")
        if model.window and not self.server:
            self.notes.append("edgekv chat lets layers with a sliding window keep the whole context while nothing is "
                              "evicted; edgekv run, as planned here, and edgekv serve (-np) keep the window only")
        if model.no_evict:
            self.notes.append(f"the cache cannot be evicted from: {model.no_evict}")

        self.kv_budget = kv_budget
        self._proposed: dict[tuple[str, int], list[library.Proposal]] = {}
        self.proposals = [] if device is None else self._propose(device)
        self.rows = [*self.caches, *self._evictions()]
        if not base.page_size and not model.no_select and flash_attn != "off":
            self.rows.append(replace(self.caches[0], page_size=16, flash_attn=True))
        self.rows += [p.setting for p in self.proposals if p.setting.policy != "none" and p.setting not in self.rows]
        self.found = [library.memory(model, s) for s in self.rows]

    def _budget(self, s: library.Setting) -> int:
        """The one that somebody wants."""
        return parse_budget(self.kv_budget, n_ctx=s.n_ctx_seq, bytes_per_token=library.token_bytes(self.model, s))

    def _evictions(self) -> list[library.Setting]:
        if self.policy == "none":
            return []
        s = replace(self.caches[0], policy=self.policy)
        if self.kv_budget is not None:
            budgets = [self._budget(s)]
        else:
            budgets = [n for share in SHARES if (n := s.n_ctx_seq // share) >= library.MIN_BUDGET]
        return [replace(s, budget=n) for n in budgets if n < s.n_ctx_seq]

    def _propose(self, device: library.Device) -> list[library.Proposal]:
        key = device.kind, device.memory  # that is all that tells one card from another here
        if key not in self._proposed:
            self._proposed[key] = self._proposals_for(device)
        return self._proposed[key]

    def _proposals_for(self, device: library.Device) -> list[library.Proposal]:
        result = library.propose(self.model, self.caches, device, self.leave, self.policy)
        if self.kv_budget is None or result[0].setting.policy == "none":
            return result
        # a budget that somebody wants: in the most exact cache that it fits in
        room = device.room(self.leave)
        for s in self.caches:
            s = replace(s, policy=self.policy, budget=min(self._budget(s), s.n_ctx_seq))
            found = library.memory(self.model, s)
            if device.needs(found) <= room:
                return [library.Proposal(s, found, True, f"no full cache fits; {s.budget:,} tokens do, in {s.type_k}"),
                        *result[1:]]
        return [replace(result[0], why=f"--kv-budget {self.kv_budget} fits no cache; {result[0].why}"), *result[1:]]

    # --- for people --------------------------------------------------------------------------------------------------

    def _shown(self, found: library.Memory) -> library.Bytes:
        """What the columns are about: the GPU's memory, or all where there is no other."""
        unified = self.device is not None and self.device.kind == "unified"
        return found.device if found.device.total and not unified else found.all

    def _fits(self, s: library.Setting, found: library.Memory) -> str:
        room = self.device.room(self.leave)
        if self.device.needs(found) <= room:
            return "yes"
        if self.device.kind == "unified":
            return "no"
        return f"-ngl {library.most_layers(self.model, s, room)}"

    def command(self, s: library.Setting) -> str:
        return shlex.join(["edgekv", "serve" if self.server else "run", str(self.model.path),
                           *library.flags(s, server=self.server)])

    def as_text(self) -> str:
        m = self.model
        kinds = [sum(layer.kind == kind for layer in m.layers) for kind in ("full", "window")]
        recurrent = sum(layer.recurrent_bytes > 0 for layer in m.layers)
        about = [f"{kinds[0]} with full attention"]
        about += [f"{kinds[1]} with a window of {m.window:,} tokens"] if kinds[1] else []
        about += [f"{recurrent} with a recurrent state"] if recurrent else []
        s = self.rows[0]
        each = f" in each of {s.n_seq} slots" if s.n_seq > 1 else ""
        text = (f"{m.name or m.path.name}: {m.architecture}, {len(m.layers)} layers ({', '.join(about)}), "
                f"{format_bytes(m.weight_bytes)} of weights; {s.n_ctx_seq:,} tokens of context{each}\n\n")
        text += self._rows() + "\n"
        split = any(found.device.total for found in self.found)
        if split and not (self.device and self.device.kind == "unified"):
            host = format_bytes(self.found[0].host.total)
            text += f"The columns are the GPU's memory; main memory takes {host} in the first row.\n"
        if self.device is None and self.compare:
            text += "\n" + self._machines()
        elif self.device is not None:
            room = self.device.room(self.leave)
            text += (f"{self.device.title}: {format_bytes(self.device.memory)}, of which {format_bytes(room)} may be "
                     "filled (--fit-target says what stays free)\n")
        for i, p in enumerate(self.proposals):
            word = "or" if i else "proposed" if p.fits else "nothing fits"
            text += f"\n{word}: {p.why} ({format_bytes(self.device.needs(p.memory))})\n"
            text += f"    {self.command(p.setting)}\n" if p.fits else ""
        return text + "".join(f"\nnote: {note}\n" for note in self.notes)

    def _rows(self) -> str:
        shown = [self._shown(found) for found in self.found]

        def sizes(of) -> list[str]:
            return [format_bytes(of(x)) if of(x) else "-" for x in shown]

        columns = [
            ("setting", [_label(s) for s in self.rows], False),
            ("cells", [str(found.cells) for found in self.found], True),
            ("weights", sizes(lambda x: x.weights), True),
            ("KV", sizes(lambda x: x.kv), True),
            ("summaries", sizes(lambda x: x.summaries), True),
            ("compute", sizes(lambda x: x.compute + x.scratch), True),
            ("total", sizes(lambda x: x.total), True),
        ]
        if self.device is not None:
            columns.append((f"fits {self.device.name}", [self._fits(*row) for row in zip(self.rows, self.found)], True))
        if not any(s.page_size for s in self.rows):
            columns.pop(4)
        return markdown(columns)

    def _machines(self) -> str:
        names, memories, rooms, best = [], [], [], []
        for (kind, size), group in groupby(sorted(library.devices(), key=lambda d: (d.kind, d.memory)),
                                           key=lambda d: (d.kind, d.memory)):
            group = list(group)
            names.append(", ".join(d.name for d in group))
            memories.append(f"{size >> 30} GiB{' unified' if kind == 'unified' else ''}")
            rooms.append(format_bytes(group[0].room(self.leave)))
            best.append("; or ".join(_brief(p) for p in self._propose(group[0])))
        return markdown([("memory", memories, False), ("to fill", rooms, True), ("what fits", best, False),
                         ("machines (--gpu)", names, False)])

    # --- for programs ------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        m = self.model
        machines = [self.device] if self.device is not None else library.devices() if self.compare else []
        return {
            "model": {"path": str(m.path), "name": m.name, "architecture": m.architecture, "n_layer": len(m.layers),
                      "weight_bytes": m.weight_bytes, "context_length": m.n_ctx_train,
                      "sliding_window": m.window or None,
                      "window_layers": [i for i, layer in enumerate(m.layers) if layer.kind == "window"]},
            "settings": [self._row_json(s, found) for s, found in zip(self.rows, self.found)],
            "devices": [
                {**asdict(d), "room": d.room(self.leave),
                 "fits": [d.needs(found) <= d.room(self.leave) for found in self.found],
                 "proposals": [{"why": p.why, "fits": p.fits, "flags": library.flags(p.setting, server=self.server),
                                "command": self.command(p.setting), **self._row_json(p.setting, p.memory)}
                               for p in (self.proposals if self.device else self._propose(d))]}
                for d in machines],
            "notes": self.notes,
        }

    def _row_json(self, s: library.Setting, found: library.Memory) -> dict[str, Any]:
        return {**asdict(s), "cells": found.cells, "window_cells": found.window_cells,
                **{name: {**asdict(place), "total": place.total} for name, place in (("device", found.device),
                                                                                     ("host", found.host))},
                "total": found.all.total}


def _label(s: library.Setting) -> str:
    text = s.type_k if s.type_k == s.type_v else f"K {s.type_k}, V {s.type_v}"
    if s.policy != "none":
        text += f", {s.budget:,} tokens kept"
    return text + (", quest" if s.page_size else "")


def _brief(p: library.Proposal) -> str:
    if not p.fits:
        return "nothing"
    layers = f", -ngl {p.setting.n_gpu_layers}" if p.setting.n_gpu_layers >= 0 else ""
    return _label(p.setting) + layers


def _plot(facts: _Plan, path: str) -> None:
    from edgekv.plot import memory_bars

    rows = []
    for s, found in zip(facts.rows, facts.found):
        x = facts._shown(found)
        rows.append((_label(s), {"weights": x.weights, "K and V": x.kv, "summaries": x.summaries,
                                 "compute": x.compute + x.scratch}))
    device = facts.device
    memory_bars(rows, path, f"{facts.model.name or facts.model.path.name}, {facts.rows[0].n_ctx:,} tokens",
                device and device.room(facts.leave), device.title if device else "")
