"""kvpress (NVIDIA's library of published evictions) on a checkpoint: what it keeps, and what that costs.

A script for an interpreter that has kvpress, which wants other versions of its dependencies than edgekv does:

    python tests/kvpress_bridge.py < REQUEST > ANSWER

REQUEST is JSON: ``model`` (a checkpoint's folder), ``context`` and ``continuation`` (token ids), ``filters`` (a file
of Q-Filters in the published form, for ``qfilters``), ``runs`` (a list of ``[policy, ratio]``; ratio: the share of the
context's cells that goes) and ``threads``.

ANSWER is a list of a run's ``nll_mean`` (natural logarithm; the continuation's tokens from the second on), ``top1``
(the arg-max behind each token of the continuation) and ``kept`` (``[layers, KV heads, n]`` positions, ascending). The
context is read exactly in float32 and evicted from once; the continuation keeps its true positions. Nothing but what
the policy itself protects is protected: 4 sinks (``streaming``), the last 64 tokens (``snapkv``, pooling over 5).

With ``tiny``, a list of numbers of tokens, in REQUEST instead: SnapKV on a small random model. ANSWER has per number
and layer the queries ``[heads, tokens, head size]`` and keys ``[KV heads, tokens, head size]`` behind RoPE that
attention was given, and kvpress' scores ``[KV heads, tokens]``.
"""

import json
import sys

POLICIES = ("qfilters", "knorm", "keydiff", "streaming", "snapkv")


def press_of(policy: str, ratio: float, filters):
    """kvpress' object for one of ``POLICIES``; ``filters``: float32 tensor ``[layers, KV heads, head size]``."""
    import kvpress

    if policy == "qfilters":
        press = kvpress.QFilterPress(compression_ratio=ratio)
        # what it would fetch from the hub by the model's name
        press.q_filters, press.post_init_from_model = filters, lambda model: None
        return press
    return {"knorm": kvpress.KnormPress, "keydiff": kvpress.KeyDiffPress, "streaming": kvpress.StreamingLLMPress,
            "snapkv": kvpress.SnapKVPress}[policy](compression_ratio=ratio)


def places(keys, kept):
    """Positions ``[KV heads, n]``, ascending, of the rows of ``kept`` among ``keys``: ``[KV heads, tokens, head size]``
    both."""
    found = []
    for all_rows, rows in zip(keys.numpy(), kept.numpy()):
        where = {row.tobytes(): i for i, row in enumerate(all_rows)}
        found.append(sorted(where[row.tobytes()] for row in rows))
        assert len(where) == len(all_rows) and len(set(found[-1])) == len(rows)
    return found


def run(model, context, continuation, press) -> dict:
    import torch
    from transformers import DynamicCache

    kept, compress = {}, press.compress

    def recorded(module, hidden_states, keys, values, *rest):
        new = compress(module, hidden_states, keys, values, *rest)
        kept[module.layer_idx] = places(keys[0], new[0][0])
        return new

    press.compress = recorded
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
    positions = torch.arange(len(context), len(context) + len(continuation))[None]
    rest = torch.tensor([continuation])
    logits = model(input_ids=rest, past_key_values=cache, position_ids=positions).logits[0].double()
    loss = torch.nn.functional.cross_entropy(logits[:-1], rest[0, 1:])
    return {"nll_mean": loss.item(), "top1": logits.argmax(-1).tolist(), "kept": [kept[il] for il in sorted(kept)]}


def run_all(request) -> list[dict]:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import torch

    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    filters = load_file(request["filters"])["q_filters"].float() if request.get("filters") else None
    return [run(model, request["context"], request["continuation"], press_of(policy, ratio, filters))
            for policy, ratio in request["runs"]]


def tiny(n_tokens: int) -> list[dict]:
    import torch
    from kvpress import SnapKVPress
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                                         initializer_range=0.4, attn_implementation="sdpa")).eval()
    seen, press = [{} for _ in range(2)], SnapKVPress(compression_ratio=0.5)
    attention, score = ALL_ATTENTION_FUNCTIONS["sdpa"], press.score

    def attended(module, query, key, *rest, **named):
        seen[module.layer_idx] |= {"queries": query[0].tolist(), "keys": key[0].tolist()}
        return attention(module, query, key, *rest, **named)

    def scored(module, *rest):
        scores = score(module, *rest)
        seen[module.layer_idx]["scores"] = scores[0].tolist()
        return scores

    ALL_ATTENTION_FUNCTIONS["sdpa"], press.score = attended, scored
    with press(model):
        model.model(input_ids=torch.randint(97, (1, n_tokens)), past_key_values=DynamicCache())
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    return seen


def main() -> None:
    request = json.load(sys.stdin)
    import torch

    torch.set_num_threads(request.get("threads", 1))
    with torch.inference_mode():
        answer = [tiny(n) for n in request["tiny"]] if "tiny" in request else run_all(request)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
