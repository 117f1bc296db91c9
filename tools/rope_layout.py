#!/usr/bin/env python3
"""Finds which architectures' conversion permutes the rows of K, by running the pinned converter's own classes.

    tools/rope_layout.py [--tree build/tree] [-o edgekv/rope_layout.json]

transformers rotates channel i of a head with channel i + d/2 (halves); llama.cpp does so in some architectures, and in
others rotates 2i with 2i + 1 (pairs), for which the converter permutes the rows of Q and K in every head.

Every text class of conversion/ gets a tiny checkpoint: the tensors and the config of transformers' own model, which is
made without memory, or, for models whose code is not in transformers, those written down in REMOTE. Each row of a
weight holds its own number. What the class's modify_tensors() gives out as K tells the order of the rows, which is the
order in which the runtime caches K. transformers caches K in the order of the checkpoint's rows, whatever it rotates
with what; MLA is the exception, and stays undecided.

Needs torch and transformers (and gguf-py of the same tree, which it finds); a minute.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEADS, KV_HEADS, SIZE = 4, 2, 16
WIDTH = HEADS * SIZE
BITS = 12
LARGE = 1 << 16  # a tensor with more numbers is none of attention's at these sizes

# in every config of transformers that has such a key, at any depth
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim"), SIZE),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 32),
    "vocab_size": 128,
    "pad_token_id": 0,
}

# what a default config of transformers needs besides
TWEAKS = {
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 4}, "num_key_value_heads": HEADS},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1},
    "FalconForCausalLM": {"new_decoder_architecture": True},
    "Gemma3nForCausalLM": {"intermediate_size": [32] * 35},
    "HunYuanDenseV1ForCausalLM": {"head_dim": SIZE},
    "HunYuanMoEV1ForCausalLM": {"head_dim": SIZE},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention"] * 32},
    "NemotronForCausalLM": {"num_key_value_heads": KV_HEADS, "head_dim": SIZE},
}

# Models that are not in transformers, or whose default there cannot be made: more of config.json, and the names and
# rows of the tensors that hold K. They are the names that the converter itself looks for (its classes, and the table of
# names in gguf-py).
_K = KV_HEADS * SIZE
_FUSED = (HEADS + 2 * KV_HEADS) * SIZE
_LLAMA = ({}, {"model.layers.0.self_attn.k_proj.weight": _K})
_LLAMA_BODY = ({}, {"layers.0.self_attn.k_proj.weight": _K})
_BAILING = ({}, {"model.layers.0.attention.query_key_value.weight": _FUSED})
_GRANITE_HYBRID = ({"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
                    "mamba_expand": 2}, {"model.layers.1.self_attn.k_proj.weight": _K})
_NEMOTRON_HYBRID = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}
_MULTI_HEAD = {"num_key_value_heads": HEADS}
REMOTE = {
    **dict.fromkeys((
        "ArcticForCausalLM", "DeciLMForCausalLM", "DeepseekForCausalLM", "DreamModel", "GrokForCausalLM",
        "GroveMoeForCausalLM", "InternLM3ForCausalLM", "LLaDAMoEModelLM", "MaincoderForCausalLM", "MapleForCausalLM",
        "MiniCPMForCausalLM", "MiniMaxText01ForCausalLM", "NanbeigeForCausalLM", "OrionForCausalLM",
        "PanguEmbeddedForCausalLM", "PhiMoEForCausalLM", "RND1", "SmallThinkerForCausalLM", "StableLMEpochForCausalLM",
        "Step3p5ForCausalLM", "StepVLForConditionalGeneration", "UltravoxModel",
    ), _LLAMA),
    **dict.fromkeys(("Lfm25AudioTokenizer", "LlamaBidirectionalModel"), _LLAMA_BODY),
    **dict.fromkeys(("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "SarvamMoEForCausalLM"), _BAILING),
    **dict.fromkeys(("BambaForCausalLM", "GraniteMoeHybridForCausalLM"), _GRANITE_HYBRID),
    "BaichuanForCausalLM": (_MULTI_HEAD, {"model.layers.0.self_attn.W_pack.weight": 3 * WIDTH}),
    "CodeShellForCausalLM": ({}, {f"transformer.h.0.attn.c_attn.{part}": _FUSED for part in ("weight", "bias")}),
    "DbrxForCausalLM": ({"ffn_config": {"moe_num_experts": 4, "ffn_hidden_size": 32}},
                        {"transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": _FUSED}),
    "ExaoneForCausalLM": ({}, {"transformer.h.0.attn.attention.k_proj.weight": _K}),
    "GraniteSwitchForCausalLM": ({"num_adapters": 1, "max_lora_rank": 4},
                                 {"model.layers.0.self_attn.qkv_proj.base_layer.weight": _FUSED}),
    "InternLM2ForCausalLM": ({}, {"model.layers.0.attention.wqkv.weight": _FUSED}),
    "LLaDAModelLM": ({}, {"model.transformer.blocks.0.k_proj.weight": _K}),
    # the dense one: a config of transformers always has experts
    "NemotronHForCausalLM": ({"hybrid_override_pattern": "M*", **_NEMOTRON_HYBRID},
                             {"backbone.layers.1.mixer.k_proj.weight": _K}),
    "NemotronHPuzzleForCausalLM": ({"block_configs": [{"block_type": "mamba"}, {"block_type": "attention"}],
                                    **_NEMOTRON_HYBRID}, {"backbone.layers.1.mixer.k_proj.weight": _K}),
    "OpenELMForCausalLM": ({"num_transformer_layers": 2, "model_dim": WIDTH, "num_kv_heads": [KV_HEADS] * 2,
                            "num_query_heads": [HEADS] * 2, "ffn_multipliers": [1.0] * 2, "ffn_dim_divisor": 16},
                           {"transformer.layers.0.attn.qkv_proj.weight": _FUSED}),
    "Plamo2ForCausalLM": ({}, {"model.layers.layers.1.mixer.qkv_proj.weight": _FUSED}),
    "Plamo3ForCausalLM": ({}, {"model.layers.layers.1.mixer.qkv_proj.weight": _FUSED}),
    "PlamoForCausalLM": ({}, {"model.layers.layers.0.self_attn.k_proj.weight": _K}),
    "QWenLMHeadModel": (_MULTI_HEAD, {f"transformer.h.0.attn.c_attn.{part}": 3 * WIDTH for part in ("weight", "bias")}),
    "RuGPT3XLForCausalLM": (_MULTI_HEAD, {f"model.layers.0.self_attn.{part}_proj.weight": WIDTH for part in "qkv"}),
    "Sarashina2VisionForCausalLM": ({}, {"llm.model.layers.0.self_attn.k_proj.weight": _K}),
    "Spark2_5ForCausalLM": ({}, {"model.layers.0.self_attn.q_k_v_proj.weight": _FUSED}),
    "TalkieForCausalLM": (_MULTI_HEAD, {"model.blocks.0.attn.attn_key.weight": WIDTH}),
    "XverseForCausalLM": (_MULTI_HEAD, {"model.layers.0.self_attn.k_proj.weight": WIDTH}),
}


class Undecided(Exception):
    """Why a class says nothing about an order."""


class DoesNotCount(Undecided):
    """Why a class need not say anything."""


# --- checkpoints ---------------------------------------------------------------------------------


def from_transformers(name):
    """(config, {tensor: (shape, whether its columns are what others have as rows)}) of transformers' model ``name``."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    model_class = getattr(transformers, name)
    config = model_class.config_class()
    shrink(config)
    for key, value in TWEAKS.get(name, {}).items():
        setattr(config, key, value)
    config.architectures = [name]
    if "mrope_section" in (getattr(config.get_text_config(), "ignore_keys_at_rope_validation", None) or ()):
        raise DoesNotCount("M-RoPE, which eviction refuses")
    with torch.device("meta"):
        model = model_class._from_config(config)
    columns = {f"{module_name}.weight" for module_name, module in model.named_modules() if isinstance(module, Conv1D)}
    return config, {key: (tuple(t.shape), key in columns) for key, t in model.state_dict().items()}


def shrink(config):
    from transformers import PretrainedConfig

    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
    for key, value in SMALL.items():
        try:
            if getattr(config, key, None) is not None:
                setattr(config, key, value)
        except Exception:
            pass  # a config that derives the key from others says so in many ways


def by_hand(name):
    more, tensors = REMOTE[name]
    hparams = {**SMALL, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **more,
               "architectures": [name]}
    return hparams, {key: ((rows, WIDTH) if key.endswith(".weight") else (rows,), False)
                     for key, rows in tensors.items()}


def numbered(shape, columns):
    """A tensor whose rows (or columns) hold their numbers: as binary digits +1 and -1, which survive a rounding to
    three values, or, where there is but one number per row, as that + 1."""
    import torch

    if len(shape) == 1:
        return torch.arange(1, shape[0] + 1, dtype=torch.float32)
    rows, width = shape[::-1] if columns else shape
    digits = torch.arange(rows)[:, None] >> (torch.arange(width) % BITS) & 1
    t = (2 * digits - 1).float()
    return t.T.contiguous() if columns else t


def numbers(t):
    """The row numbers that a converted tensor holds."""
    import torch

    if t.dim() == 1:
        return (t - 1).long()
    if t.dim() != 2 or t.shape[1] < BITS or (t == 0).any():
        raise Undecided(f"K of shape {list(t.shape)} cannot be read")
    return ((t[:, :BITS] > 0).long() << torch.arange(BITS)).sum(dim=1)


# --- conversion ----------------------------------------------------------------------------------


def converted(converter, config, tensors):
    """(GGUF architecture, {tensor name: tensor}) that the converter's class makes of a checkpoint."""
    import gguf
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if isinstance(config, dict):
            (folder / "config.json").write_text(json.dumps(config))
        else:
            config.save_pretrained(folder)
        save_file({name: numbered(*how) for name, how in tensors.items()
                   if len(how[0]) in (1, 2) and torch.Size(how[0]).numel() <= LARGE}, folder / "model.safetensors")
        try:
            model = converter(folder, gguf.LlamaFileType.ALL_F32, folder / "out.gguf", eager=True)
        except NotImplementedError:
            raise DoesNotCount("converts no text model") from None
        out, failure = {}, None
        for name, tensor in model.get_tensors():
            bid = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            try:
                out.update(model.modify_tensors(tensor, name, bid))
            except Exception as error:  # a class may want other tensors than those of attention to be whole
                failure = failure or f"{type(error).__name__} at {name}"
        return gguf.MODEL_ARCH_NAMES[model.model_arch], out, failure


def is_permuted(out, failure):
    """Whether K of a converted checkpoint is in pairs where it was in halves."""
    orders = set()
    for name, tensor in out.items():
        if re.fullmatch(r"blk\.\d+\.attn_(kv_a_mqa|k_b|kv_b)\.weight", name):
            raise Undecided("MLA")
        match = re.fullmatch(r"blk\.\d+\.attn_(k|qkv)\.(weight|bias)", name)
        if not match:
            continue
        rows = numbers(tensor)
        if match[1] == "qkv":  # llama.cpp's order: all of Q, all of K, all of V
            n_kv = (len(rows) // SIZE - HEADS) // 2
            rows = rows[HEADS * SIZE:(HEADS + n_kv) * SIZE]
        if len(rows) == 0 or len(rows) % SIZE:
            raise Undecided(f"{len(rows)} rows of K, not heads of {SIZE}")
        heads = rows.reshape(-1, SIZE)
        first = heads.min(dim=1).values
        if (first.diff() <= 0).any():
            raise Undecided("another order of heads")
        orders.update(map(tuple, (heads - first[:, None]).tolist()))
    kept = tuple(range(SIZE))
    pairs = tuple(i // 2 + i % 2 * SIZE // 2 for i in range(SIZE))
    if not orders:
        raise Undecided(failure or "no K")
    if orders == {kept} or orders == {pairs}:
        return orders == {pairs}
    raise Undecided("another order of channels")


def layouts(tree):
    """({architecture: {permuted, classes}}, {architecture: why it is undecided}); classes by their names in
    transformers."""
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]  # before an installed gguf
    warnings.simplefilter("ignore")
    import gguf
    import transformers
    from conversion import TEXT_MODEL_MAP
    from conversion.base import ModelBase, ModelType

    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for module in sorted(set(TEXT_MODEL_MAP.values())):
        importlib.import_module(f"conversion.{module}")
    ModelBase.no_mtp = True  # as --no-mtp: heads that predict further tokens are no part of the model

    votes = {}    # architecture -> {name in transformers: {permuted}}
    reasons = {}  # architecture -> {class of the converter: [why it has no vote]}
    voted = set()
    for name, converter in sorted(ModelBase._model_classes[ModelType.TEXT].items()):
        why = reasons.setdefault(gguf.MODEL_ARCH_NAMES[converter.model_arch], {}).setdefault(converter, [])
        for source in sources(name):
            try:
                arch, *made = converted(converter, *source(name))
                votes.setdefault(arch, {}).setdefault(name, set()).add(is_permuted(*made))
                voted.add(converter)
            except Undecided as reason:
                why.append(reason)
            except Exception as error:
                why.append(Undecided(f"{type(error).__name__} with {name}"))

    decided, undecided = {}, {}
    for arch in sorted({*votes, *reasons}):
        silent = {converter: why or [Undecided("its tensors are not known here")]
                  for converter, why in reasons.get(arch, {}).items() if converter not in voted}
        found = set().union(*votes.get(arch, {}).values())
        if len(found) == 1 and all(isinstance(why[0], DoesNotCount) for why in silent.values()):
            decided[arch] = {"permuted": found.pop(), "classes": sorted(votes[arch])}
        else:
            undecided[arch] = ("its classes disagree" if len(found) > 1 else
                               "; ".join(sorted({str(why[0]) for why in silent.values()})))
    return decided, undecided


def sources(name):
    import transformers

    return [from_transformers] * hasattr(transformers, name) + [by_hand] * (name in REMOTE)


def text_of(decided, undecided):
    """The JSON, one architecture per line."""
    def lines(entries):
        return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in entries.items())

    pin = json.loads((ROOT / "patches" / "pin.json").read_text())
    pin = json.dumps({key: pin[key] for key in ("name", "version")})
    return (f'{{\n "architectures": {{\n{lines(decided)}\n }},\n "pin": {pin},\n'
            f' "undecided": {{\n{lines(undecided)}\n }}\n}}\n')


def main():
    parser = argparse.ArgumentParser(prog="rope_layout.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT / "build" / "tree", help="an unpacked llama.cpp of the pin")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "edgekv" / "rope_layout.json")
    arguments = parser.parse_args()
    if not (arguments.tree / "conversion" / "base.py").is_file():
        sys.exit(f"rope_layout.py: --tree {arguments.tree}: holds no conversion/; run: "
                 "tools/llama_source.py unpack --dest build/tree")
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"rope_layout.py: needs {package}; pip install '.[convert]'")
    decided, undecided = layouts(arguments.tree.absolute())
    arguments.output.write_text(text_of(decided, undecided))
    print(f"{arguments.output}: {len(decided)} architectures decided, {len(undecided)} not")


if __name__ == "__main__":
    main()
