"""A Hugging Face checkpoint of a real model, made from its GGUF file."""

import json
from pathlib import Path

import gguf

CONTROL = 3  # GGUF's type of tokens that stand for no text


def write_checkpoint(path: Path, folder: Path) -> Path:
    """The folder that transformers would have saved before SmolLM2 was converted: de-quantised weights, its tokenizer.

    transformers writes a wrong tokenizer for this file, so it is rebuilt from the file's tokens and merges.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # a model that was read from GGUF counts as quantised, which transformers does not save
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)

    fields = gguf.GGUFReader(path).fields
    tokens, merges, types, template = (fields[f"tokenizer.{name}"].contents() for name in
                                       ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template"))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, types) if kind == CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
               for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "chat_template": template, "model_max_length": 8192, **special}))
    return folder
