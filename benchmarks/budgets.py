"""Would heads and layers with budgets of their own find more than heads that all have the same? A simulation.

    python benchmarks/budgets.py MODEL [-c 1024] [-n 10] [-s 0] [--kv-budget x2,x4,x8] [--policies kvdiff,keydiff]
        [--budgets "uniform,heads,heads and layers,calibrated,dense 2"] [-t 1] [-o md]

MODEL is a GGUF file, or a checkpoint's folder with ``--gguf FILE`` for its tokenizer and filters. Nothing is evicted
and no memory is freed: transformers holds the whole cache, and a mask hides from each KV head the cells that it would
have lost. A document as those of ``edgekv eval niah`` is read once, and every setting is asked about it.

All schemes keep the same number of cells over all layers and heads, and in every head the sinks and the window. The
rest of the budget is given out:

- ``uniform``: the same to every head, as the runtime does.
- ``heads``: a layer's heads compete by their scores; each has at least SAFEGUARD of its uniform rest (AdaKV, arXiv
  2407.11550). ``heads and layers``: all heads of all layers compete.
- ``calibrated``: the mean shares that ``heads and layers`` gives on documents of other seeds, per policy and budget.
- the same with `` by attention``: they compete by the attention of the last queries (SnapKV's scores) instead, whatever
  policy chooses a head's own tokens.
- ``dense N``: the first N layers keep everything, the others share what is left equally.

Policies are sums of z-scores per head, so heads can be compared; raw scores have another scale in every head. Only
``snapkv`` is raw: attention sums to one in every head.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekv.calibrate import filters_for
from edgekv.errors import EdgekvError
from edgekv.eval.haystack import Haystack, default_paragraphs
from edgekv.eval.report import FORMATS, Score, needle_report
from edgekv.eval.tasks import Document, Question, needle_documents
from edgekv.gguf_file import GGUF
from edgekv.progress import bar
from edgekv.pull import resolve_model
from edgekv.rope_layout import pairs_to_halves, permuted
from edgekv.session import Vocabulary
from edgekv.settings import EvictionSettings
from policies import IDEAS, TASKS, Cache, settings

ATTENTION = "edgekv_budgets"  # our name among transformers' attentions
SAFEGUARD = 0.2
CALIBRATION_SEEDS = range(1000, 1004)
TOGETHER = 16  # settings that are asked at once
LAST_QUERIES = 256  # the longest window

POLICIES = {
    "kvdiff": IDEAS["kvdiff"],
    "keydiff": IDEAS["keydiff"],
    "qfilters": IDEAS["qfilters"],
    "qfilters+keydiff": IDEAS["qfilters + keydiff"],
    "kvdiff+qfilters+recency": IDEAS["kvdiff + qfilters / 2 - 1.5 age (the default)"],
    "snapkv": None,  # the only one that looks at queries
}
BY_ATTENTION = " by attention"
SCHEMES = ("uniform", *(kind + by for by in ("", BY_ATTENTION) for kind in ("heads", "heads and layers", "calibrated")))


class Seen:
    """What the tokens behind a document may look at. Several settings are asked at once: the tokens of all lie in one
    sequence, and each sees its setting's own, and of the document what is ``kept``: bool ``[settings, layers, KV heads,
    tokens]``."""

    def __init__(self, kept: Tensor):
        self.kept = kept
        self.owners = self.positions = torch.empty(0, dtype=torch.long)

    def add(self, owners: Tensor, positions: Tensor) -> None:
        """The tokens that are read next: the setting and the position of each."""
        self.owners, self.positions = torch.cat([self.owners, owners]), torch.cat([self.positions, positions])
        self.new = slice(len(self.owners) - len(owners), None)

    def mask(self, layer: int) -> Tensor:
        """bool ``[KV heads, new tokens, keys]``"""
        owners, positions = self.owners[self.new, None], self.positions[self.new, None]
        document = self.kept[owners[:, 0], layer].transpose(0, 1)
        behind = (owners == self.owners) & (positions >= self.positions)
        return torch.cat([document, behind.expand(len(document), -1, -1)], dim=-1)


def attention(module, query: Tensor, key: Tensor, value: Tensor, _mask, seen: Seen | None = None,
              last: dict[int, Tensor] | None = None, scaling: float | None = None, **kwargs):
    """transformers' SDPA, with ``seen`` as the mask. ``last`` gets the last queries of each layer, scaled."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if last is not None:
        last[module.layer_idx] = query[0, :, -LAST_QUERIES:] * scaling
    mask = seen and seen.mask(module.layer_idx).repeat_interleave(query.shape[1] // key.shape[1], dim=0)[None]
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


class Reader:
    """A model and the one document that it holds: ``keys`` and ``values`` as float32 ``[layers, KV heads, tokens, head
    size]``, ``last``: the last queries ``[layers, heads, queries, head size]``."""

    def __init__(self, model: str, path: Path):
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, lambda *_args, **_kwargs: None)
        folder, file = (model, None) if Path(model).is_dir() else (path.parent, path.name)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars
                self.model = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=file, dtype=torch.float32, attn_implementation=ATTENTION, local_files_only=True)
        except Exception as error:  # whatever a file can make transformers raise
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EdgekvError(f"{model}: transformers cannot load it: {line}") from None
        text = self.model.config.get_text_config(decoder=True)
        if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise EdgekvError(f"{model}: only models whose layers all have full attention are simulated")
        self.n_layer, self.n_head_kv = text.num_hidden_layers, text.num_key_value_heads

    def read(self, tokens: Sequence[int]) -> None:
        last: dict[int, Tensor] = {}
        self.cache = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1, last=last).past_key_values
        self.n = len(tokens)
        self.keys, self.values = (torch.stack([getattr(layer, name)[0] for layer in self.cache.layers])
                                  for name in ("keys", "values"))
        self.last = torch.stack([last[i] for i in range(self.n_layer)])

    def answers(self, vocabulary: Vocabulary, question: Question, kept: Tensor) -> list[str]:
        """The greedy answers of all settings, each ended as :func:`edgekv.eval.needles.answer` ends it."""
        asked = vocabulary.tokenize(question.asked)[len(vocabulary.tokenize("")) :]
        seen, made, said = Seen(kept), [[] for _ in kept], [""] * len(kept)
        tokens, live, at = [asked] * len(kept), list(range(len(kept))), self.n
        while live:
            n_new = len(tokens[0])
            positions = torch.arange(at, at + n_new).repeat(len(live))
            seen.add(torch.tensor(live).repeat_interleave(n_new), positions)
            out = self.model(torch.tensor(tokens).reshape(1, -1), position_ids=positions[None], use_cache=True,
                             past_key_values=self.cache, seen=seen,
                             logits_to_keep=torch.arange(1, len(live) + 1) * n_new - 1)
            going = []
            for i, token in zip(live, out.logits[0].argmax(-1).tolist()):
                said[i], more = vocabulary.text(made[i]), vocabulary.text([*made[i], token])
                new = more[len(said[i]):]
                found = not new[:1].isalnum() and question.score(said[i]) == 1
                if not (found or len(made[i]) >= question.n_predict or vocabulary.ends(token) or "\n" in new):
                    made[i].append(token)
                    going.append(i)
            live, tokens, at = going, [made[i][-1:] for i in going], at + n_new
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.n], layer.values[:, :, : self.n]
        return [text.strip() for text in said]

    def caches(self, filters: np.ndarray) -> list[Cache]:
        distance = np.broadcast_to(self.n - np.arange(self.n), (self.n_head_kv, self.n))
        return [Cache(k, v, f, distance) for k, v, f in zip(self.keys.numpy(), self.values.numpy(), filters)]

    def scores(self, policy: str, held: Sequence[Cache], how: EvictionSettings) -> Tensor:
        """float32 ``[layers, KV heads, tokens]``, higher means: keep."""
        if policy == "snapkv":
            return self.attended(how.window)
        return torch.tensor(np.stack([POLICIES[policy](layer.within(how.budget)) for layer in held]))

    def attended(self, window: int) -> Tensor:
        """SnapKV's scores (arXiv 2404.14469): the attention of the last tokens, pooled over 5 neighbours, mean over the
        query heads of a KV head; 0 in the window."""
        window = max(1, window)
        future = torch.ones(window, self.n, dtype=torch.bool).triu(self.n - window + 1)
        found = torch.zeros(self.n_layer, self.n_head_kv, self.n)
        for layer, (keys, queries) in enumerate(zip(self.keys, self.last[:, :, self.last.shape[2] - window :])):
            each = queries.reshape(self.n_head_kv, -1, window, queries.shape[-1])
            weights = (each @ keys[:, None].mT).masked_fill(future, -torch.inf).softmax(-1)[..., : self.n - window]
            found[layer, :, : self.n - window] = torch.nn.functional.avg_pool1d(weights.mean((1, 2)), 5, 1, 2)
        return found


def give_out(scheme: str, how: EvictionSettings, compete: Tensor, shares: Tensor | None = None) -> Tensor:
    """How many cells each head keeps beside sinks and window: int64 ``[layers, KV heads]``.

    compete: scores ``[layers, KV heads, tokens]`` without sinks and window; ``shares``: of ``calibrated``.
    """
    n_layer, n_head, n = compete.shape
    rest = how.budget - how.keep - how.window
    total = rest * n_layer * n_head
    if rest > n:
        raise EdgekvError(f"--kv-budget {how.budget}: a document has {n + how.keep + how.window} tokens; take fewer")
    if scheme == "uniform":
        counts = torch.full((n_layer, n_head), rest)
    elif scheme.startswith("dense "):
        dense = int(scheme.split()[1])
        left = total - dense * n_head * n
        if left < 0:
            raise EdgekvError(f"--budgets {scheme}: whole layers of {n + how.keep + how.window} tokens leave too few "
                              f"cells for the others with a budget of {how.budget}; take fewer, or a larger budget")
        counts = torch.full((n_layer, n_head), n)
        counts[dense:] = apportioned(torch.ones(n_layer - dense, n_head), left, n)
    elif scheme.startswith("calibrated"):
        counts = apportioned(shares, total, n)
    else:
        safe = compete.scatter(-1, compete.topk(int(SAFEGUARD * rest)).indices, torch.inf)
        rivals = safe.reshape(1 if "layers" in scheme else n_layer, -1)
        won = torch.zeros_like(rivals, dtype=torch.long).scatter(-1, rivals.topk(total // len(rivals)).indices, 1)
        counts = won.reshape(compete.shape).sum(-1)
    assert counts.sum() == total and 0 <= counts.min() and counts.max() <= n
    return counts


def apportioned(shares: Tensor, total: int, most: int) -> Tensor:
    """``total`` cells by ``shares``, at most so many each; what is too much for one goes to the others."""
    counts = torch.zeros(shares.shape, dtype=torch.long)
    while left := total - int(counts.sum()):
        weights = (shares.double() + 1e-9) * (counts < most)
        more = (left * weights / weights.sum()).long()
        if not more.any():
            more.view(-1)[weights.view(-1).topk(min(left, int((weights > 0).sum()))).indices] = 1
        counts = (counts + more).clamp(max=most)
    return counts


def kept(scores: Tensor, counts: Tensor, how: EvictionSettings) -> Tensor:
    """bool ``[layers, KV heads, tokens]``: sinks, window, and the best so many of each head."""
    found = torch.ones(scores.shape, dtype=torch.bool)
    middle = slice(how.keep, scores.shape[-1] - how.window)
    ranks = scores[..., middle].argsort(-1, descending=True).argsort(-1)
    found[..., middle] = ranks < counts[..., None]
    assert found.sum() == how.budget * counts.numel()
    return found


def plans(reader: Reader, filters: np.ndarray, args, schemes: Sequence[str], shares: dict) -> Iterator[tuple]:
    """Of the document at hand: (policy, budget, scheme, its settings, scores, the cells that each head gets)."""
    held = reader.caches(filters)
    for policy, budget in product(args.policies, args.kv_budget):
        how = settings(budget, reader.n)
        middle = slice(how.keep, reader.n - how.window)
        scores = reader.scores(policy, held, how)
        for scheme in schemes:
            compete = reader.attended(how.window) if scheme.endswith(BY_ATTENTION) else scores
            counts = give_out(scheme, how, compete[..., middle], shares.get((policy, budget, scheme)))
            yield policy, budget, scheme, how, scores, counts


def run(path: Path, args) -> str:
    found = filters_for(path, n_threads=args.threads)
    reader = Reader(args.model, path)
    if (len(found.vectors), len(found.vectors[0])) != (reader.n_layer, reader.n_head_kv):
        raise EdgekvError(f"{args.model}: its layers and KV heads are not those of {path}")
    filters = np.stack(found.vectors)
    if permuted(GGUF(path).architecture):
        filters = pairs_to_halves(filters)  # keys are in transformers' order here
    with Vocabulary(path) as vocabulary, torch.inference_mode():
        def tokenize(text: str) -> list[int]:
            return vocabulary.tokenize(text, special=False)

        def documents(seeds) -> list[Document]:
            return list(needle_documents(Haystack(default_paragraphs()), tokenize, lengths=[args.length], tasks=TASKS,
                                         seeds=seeds, reserve=8))

        asked = [(d, vocabulary.tokenize(d.text)) for d in documents(range(args.seed, args.seed + args.documents))]
        known = ["uniform", *(scheme for scheme in args.budgets if scheme.startswith("dense "))]
        for scheme, budget, (_, tokens) in product(known, args.kv_budget, asked):
            how = settings(budget, len(tokens))  # what cannot be is said before anything is read
            n = max(0, len(tokens) - how.keep - how.window)
            give_out(scheme, how, torch.empty(reader.n_layer, reader.n_head_kv, n))

        fixed = [scheme for scheme in args.budgets if scheme.startswith("calibrated")]
        shares: dict[tuple, Tensor] = {}
        for d in documents(CALIBRATION_SEEDS) if fixed else ():
            reader.read(vocabulary.tokenize(d.text))
            like = [scheme.replace("calibrated", "heads and layers") for scheme in fixed]
            for policy, budget, scheme, *_, counts in plans(reader, filters, args, like, {}):
                key = policy, budget, scheme.replace("heads and layers", "calibrated")
                shares[key] = shares.get(key, 0) + counts / counts.sum()

        scores: list[Score] = []
        n_settings = 1 + len(args.policies) * len(args.kv_budget) * len(args.budgets)
        with bar("answers", len(asked) * n_settings * len(TASKS)) as advance:
            for d, tokens in asked:
                reader.read(tokens)
                labels, masks = [("none", "none", 1.0)], [torch.ones(reader.keys.shape[:-1], dtype=torch.bool)]
                for policy, budget, scheme, how, given, counts in plans(reader, filters, args, args.budgets, shares):
                    labels.append((f"{policy} {budget}, {scheme}", f"{policy}, {scheme}", reader.n / how.budget))
                    masks.append(kept(given, counts, how))
                for i, q in product(range(0, len(masks), TOGETHER), d.questions):
                    answers = reader.answers(vocabulary, q, torch.stack(masks[i : i + TOGETHER]))
                    scores += [Score(d.key, d.length, q.task, None, *label, q.score(answer))
                               for label, answer in zip(labels[i:], answers)]
                    advance(len(answers))
    return report(scores, args)


def report(scores: Sequence[Score], args) -> str:
    """A report per policy, each scheme against the first; ``json``: a list of them."""
    reports = []
    for policy in args.policies:
        own = [s for s in scores if s.method == "none" or s.method.startswith(f"{policy}, ")]
        reports.append(needle_report(own, args.output, against=f"{policy}, {args.budgets[0]}"))
    return f"[{','.join(reports)}]" if args.output == "json" else "\n".join(reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--gguf", help="of a checkpoint: the file that was converted from it")
    parser.add_argument("-c", "--length", type=int, default=1024, help="tokens [default: 1024]")
    parser.add_argument("-n", "--documents", type=int, default=10)
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("--kv-budget", default="x2,x4,x8")
    parser.add_argument("--policies", default="kvdiff,kvdiff+qfilters+recency")
    parser.add_argument("--budgets", default="uniform,heads,heads and layers,calibrated,dense 2")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", choices=FORMATS, default="md")
    args = parser.parse_args()
    for name in ("kv_budget", "policies", "budgets"):
        setattr(args, name, list(dict.fromkeys(part.strip() for part in getattr(args, name).split(","))))
    for flag, names, known in ("--policies", args.policies, POLICIES), ("--budgets", args.budgets, SCHEMES):
        if unknown := [n for n in names if n not in known and not (known is SCHEMES and re.fullmatch(r"dense \d+", n))]:
            parser.error(f"{flag} {unknown[0]}: unknown, choose from {', '.join(known)}"
                         + (", dense N" if known is SCHEMES else ""))
    if Path(args.model).is_dir() and not args.gguf:
        parser.error(f"{args.model}: is a checkpoint; name the file that was converted from it with --gguf")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        print(run(Path(resolve_model(args.gguf or args.model)), args))
    except EdgekvError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
