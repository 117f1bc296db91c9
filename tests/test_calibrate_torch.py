"""Calibration with torch: what the tap tells against NumPy and the model's cache, filters against the GGUF's."""

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from gguf import GGUFReader

from edgekv import calibrate as on_gguf
from edgekv import calibrate_torch, native
from edgekv.errors import EdgekvError
from tinymodel import write_tiny_model

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs torch, which tools/test --slow installs")
transformers = pytest.importorskip("transformers")

N_TOKENS, BASE, EPS = 40, 10000.0, 1e-6
SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rms_norm_eps=EPS, pad_token_id=0,
             rope_parameters={"rope_type": "default", "rope_theta": BASE})
WINDOWS = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    # scores far beyond the cap, so that an attention without it gives other logits
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, **WINDOWS, attn_logit_softcapping=2., query_pre_attn_scalar=1),
    "gpt_oss": lambda: transformers.GptOssConfig(**SHAPE, **WINDOWS, num_local_experts=4, num_experts_per_tok=2),
}


def random_model(config, seed=0, **options):
    """A model whose norms, biases and sinks are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5) + ("norm" in name))
    return model


def told_by(model, tokens, **options):
    """(layer, queries, keys) of one forward pass with the tap, and what the model returned."""
    told = []
    with torch.no_grad(), calibrate_torch.tapped(model, lambda *what: told.append(what)):
        out = model(tokens, **options)
    return told, out


def rope(x):
    """[batch, head, token, channel], channel i turns with i + d/2."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] * BASE ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tap(family, attention):
    model = random_model(FAMILIES[family](), attn_implementation=attention)
    tokens = torch.randint(1, 97, (2, N_TOKENS))
    padding = torch.ones_like(tokens)

    projected = {}
    for il, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda _m, _i, out, key=(il, name): projected.__setitem__(key, out.double().numpy()))
    before = model.config._attn_implementation
    told, out = told_by(model, tokens, use_cache=True)
    assert model.config._attn_implementation == before and not calibrate_torch._taps
    assert [il for il, _, _ in told] == [0, 1, 2]

    for il, queries, keys in told:
        for name, found, heads in (("q", queries, 4), ("k", keys, 2)):
            assert found.shape == (2, heads, N_TOKENS, 32)
            x = projected[il, f"{name}_proj"].reshape(2, N_TOKENS, heads, 32)
            if family == "qwen3":
                weight = getattr(model.model.layers[il].self_attn, f"{name}_norm").weight.detach().double().numpy()
                x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight
            expected = rope(x.swapaxes(1, 2))
            assert np.abs(found.double().numpy() - expected).max() < 1e-4 * np.abs(expected).max()
        cached = out.past_key_values.layers[il].keys  # of a window no more than it needs
        assert torch.equal(keys[:, :, -cached.shape[2]:], cached)
    assert out.past_key_values.layers[1].keys.shape[2] == N_TOKENS

    padding[0, :7] = 0
    for mask in (None, padding):
        with torch.no_grad():
            plain = model(tokens, attention_mask=mask).logits
        assert torch.equal(told_by(model, tokens, attention_mask=mask)[1].logits, plain)


def test_tap_is_the_models_own():
    """Another model of the same configuration, at the same time, tells nothing; an error takes the tap off."""
    config = FAMILIES["llama"]()
    one, other = random_model(config), random_model(config)
    assert one.config is other.config
    tokens, told = torch.arange(1, 9)[None], []
    with torch.no_grad():
        plain = other(tokens).logits
        with calibrate_torch.tapped(one, lambda *what: told.append(what)):
            assert torch.equal(other(tokens).logits, plain) and not told
            one(tokens)
    assert len(told) == 3

    with pytest.raises(ZeroDivisionError), calibrate_torch.tapped(one, lambda *_: 1 / 0):
        one(tokens)
    assert one.config._attn_implementation == "sdpa" and not calibrate_torch._taps


def test_only_self_attention_of_the_decoder():
    tokens = torch.randint(1, 90, (1, 12))
    gpt2 = transformers.GPT2Config(vocab_size=97, n_embd=64, n_head=4, n_layer=2, add_cross_attention=True)
    told, _ = told_by(random_model(gpt2), tokens, encoder_hidden_states=torch.randn(1, 5, 64))
    assert [(il, tuple(k.shape)) for il, _, k in told] == [(0, (1, 4, 12, 16)), (1, (1, 4, 12, 16))]

    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=32,
                  patch_size=8)
    sees = transformers.Gemma3Config(text_config={**SHAPE, **WINDOWS}, vision_config=vision, mm_tokens_per_image=4,
                                     image_token_id=95, boi_token_id=93, eoi_token_id=94)
    tokens[0, 2:6] = 95
    types = (tokens == 95).long()
    told, _ = told_by(random_model(sees), tokens, pixel_values=torch.randn(1, 3, 32, 32), token_type_ids=types)
    assert [(il, q.shape[1]) for il, q, _ in told] == [(0, 4), (1, 4), (2, 4)]


def test_layers_that_share_keys():
    """Whoever reads another layer's keys is counted to that layer."""
    shape = {**SHAPE, "num_hidden_layers": 7, "rope_parameters": None}
    config = transformers.Gemma3nTextConfig(
        **shape, sliding_window=16, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
        + ["sliding_attention"], num_kv_shared_layers=3, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 7)
    model = random_model(config)
    told, _ = told_by(model, torch.randint(1, 97, (1, N_TOKENS)))
    keys = {il: k for il, _, k in told}
    source = {il: next(o for o in range(il + 1) if torch.equal(keys[o], keys[il])) for il in keys}
    assert source == {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 2, 6: 3}

    def statistics(layers):
        found = calibrate_torch._Statistics(model, {il: native.CacheLayer(il, 4, 2, 32, 32, 0, 0) for il in layers},
                                            "folder", "file.gguf")
        for il, queries, k in told:
            found.add(il, queries, k)
        found.keep()
        return found

    found = statistics(range(4))
    for il in range(4):
        q = np.concatenate([q[0].double().numpy() for reader, q, _ in told if source[reader] == il], 1)
        moment, total, group, n = found.layer(il)
        assert np.allclose(moment, np.einsum("htc,htd->hcd", q, q)) and np.allclose(total, q.sum(1))
        assert (group, n) == (2, q.shape[1])
    with pytest.raises(EdgekvError, match=r"^folder: transformers shows no queries of layer 4; .*torch\)$"):
        statistics(range(5))


def test_attention_that_cannot_be_tapped():
    config = transformers.GPTJConfig(vocab_size=97, n_embd=64, n_head=4, n_layer=2, rotary_dim=8, n_positions=64)
    with pytest.raises(EdgekvError, match=r"GPTJForCausalLM; .*\(drop --calibrate-with torch\)$"):
        told_by(random_model(config), torch.arange(1, 9)[None])


# --- filters -----------------------------------------------------------------------------------------------------


def checkpoint(gguf, folder, arch):
    """The same model as a checkpoint: names and rows by the definition of the two formats, not by the converter."""
    reader = GGUFReader(gguf)
    w = {t.name: torch.tensor(np.array(t.data, np.float32)) for t in reader.tensors}
    shape = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, rms_norm_eps=1e-5,
                 tie_word_embeddings=False)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if arch == "gemma3":
        parts |= {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                  "post_feedforward_layernorm": "post_ffw_norm", "self_attn.q_norm": "attn_q_norm",
                  "self_attn.k_norm": "attn_k_norm"}
        config = transformers.Gemma3TextConfig(
            **shape, query_pre_attn_scalar=32, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
            rope_parameters={kind: {"rope_type": "default", "rope_theta": BASE}
                             for kind in ("sliding_attention", "full_attention")})
    else:
        config = transformers.LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": BASE})
    weights = {"model.embed_tokens.weight": w["token_embd.weight"], "model.norm.weight": w["output_norm.weight"],
               "lm_head.weight": w["output.weight"]}
    for il in range(2):
        for theirs, ours in parts.items():
            t = w[f"blk.{il}.{ours}.weight"]
            if arch == "llama" and ours in ("attn_q", "attn_k"):  # pairs of rows that turn together to halves
                rows = t.reshape(-1, 16, 2, t.shape[1])
                t = torch.cat([rows[:, :, 0], rows[:, :, 1]], 1).reshape(t.shape)
            weights[f"model.layers.{il}.{theirs}.weight"] = t
    if arch == "gemma3":
        weights = {name: t - 1 if "norm" in name else t for name, t in weights.items()}
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request, tmp_path_factory):
    """A GGUF file, its checkpoint, a text, and the layers that need filters."""
    folder = tmp_path_factory.mktemp(request.param)
    # scaled, so that queries have a main direction
    gguf = write_tiny_model(folder / "tiny.gguf", n_ctx=2048, arch=request.param, scale=2.0)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 80)  # 3,600 bytes, one token each
    layers = [0, 1] if request.param == "llama" else [1]
    return gguf, checkpoint(gguf, folder / "checkpoint", request.param), text, layers


def cosines(one, other):
    assert one.layers == other.layers
    a, b = (np.concatenate(filters.vectors).astype(np.float64) for filters in (one, other))
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def with_torch(pair, **options):
    gguf, folder, text, _ = pair
    return calibrate_torch.calibrate(folder, gguf, text_files=[text], device="cpu", **options)


def test_same_filters_as_on_the_gguf(pair):
    gguf, _, text, layers = pair
    expected = on_gguf.calibrate(gguf, text_files=[text], n_threads=1)
    assert [layer.il for layer in native.cache_layers(gguf)] == layers
    found = with_torch(pair, n_threads=1)
    assert cosines(found, expected).min() > 0.9999
    for name in ("energy", "one_sided"):
        assert np.allclose(found.report[name], expected.report[name], atol=1e-3)
    for name in ("n_tokens", "n_queries", "text_sha256", "model_sha256"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.method.startswith("calibrated with torch on cpu in float32")
    assert torch.__version__ in found.runtime and transformers.__version__ in found.runtime


def test_out_of_memory(pair, monkeypatch):
    """A device too small for a sequence: smaller pieces, the same filters; nothing is counted twice."""
    expected = with_torch(pair)
    model = transformers.AutoModel.from_pretrained(pair[1])
    mlp, most, seen = type(model.layers[1].mlp), 600, []
    forward = mlp.forward

    def small(self, x):
        seen.append(x.shape[1])
        # in the last layer, when all queries have been told
        if x.shape[1] > most and len(seen) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x)

    steps = []
    monkeypatch.setattr(mlp, "forward", small)
    monkeypatch.setattr(calibrate_torch, "bar", lambda *_, **__: nullcontext(steps.append))
    found = with_torch(pair)
    assert seen[:4] == [2048, 2048, 1024, 1024] and set(seen[4:]) == {512}
    assert np.abs(found.flat() - expected.flat()).max() < 1e-6
    assert found.n_queries == expected.n_queries == sum(steps)

    most = 0
    with pytest.raises(EdgekvError, match=r"checkpoint: the memory of cpu is too small; .*--calibrate-with torch\)$"):
        with_torch(pair)


def test_pieces_need_a_cache_of_keys_alone():
    shape = {**SHAPE, "head_dim": None, "rms_norm_eps": None}
    lfm2 = transformers.Lfm2Config(**{k: v for k, v in shape.items() if v is not None},
                                   layer_types=["conv", "full_attention", "conv"])
    assert [calibrate_torch._has_state(random_model(c)) for c in (lfm2, FAMILIES["gemma2"]())] == [True, False]


def test_what_can_go_wrong(pair, tmp_path, monkeypatch):
    gguf, good, text, _ = pair

    def fails(match, folder, **options):
        with pytest.raises(EdgekvError, match=match) as caught:
            calibrate_torch.calibrate(folder, gguf, text_files=[text], **{"device": "cpu", **options})
        assert "\n" not in str(caught.value)

    def variant(name, **changed):
        folder = tmp_path / name
        model = transformers.AutoModelForCausalLM.from_pretrained(good)
        config = type(model.config)(**{**model.config.to_dict(), **changed})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    fails("^nowhere: no such folder", "nowhere")
    fails("empty: transformers cannot load it", (tmp_path / "empty").mkdir() or tmp_path / "empty")
    fails("--device nonsense: torch cannot use it", good, device="nonsense")
    fails("heads: layer . has 4 query heads, 1 KV heads of 32 channels, but .*tiny.gguf has 4, 2 of 32; it is another",
          variant("heads", num_key_value_heads=1))
    fails("tokens: has fewer tokens than .*tiny.gguf; it is another", variant("tokens", vocab_size=50, pad_token_id=0,
                                                                           bos_token_id=1, eos_token_id=1))

    code = variant("code")
    settings = json.loads((code / "config.json").read_text())
    settings.update(model_type="unheard", auto_map={"AutoConfig": "made.Config", "AutoModel": "made.Model"})
    (code / "config.json").write_text(json.dumps(settings))
    (code / "made.py").write_text("raise SystemExit('was run')")
    fails("code: transformers cannot load it: .*custom code", code)

    cut = variant("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    fails("cut: transformers cannot load it", cut)

    model = transformers.AutoModelForCausalLM.from_pretrained(good)
    weights = model.state_dict()
    model.save_pretrained(tmp_path / "part", state_dict={k: v for k, v in weights.items() if "1.mlp.up" not in k})
    fails(r"part: has no weights layers.1.mlp.up_proj.weight; fetch the whole", tmp_path / "part")
    weights["model.layers.1.self_attn.q_proj.weight"][0] = np.inf
    model.save_pretrained(tmp_path / "inf", state_dict=weights)
    fails("inf: the queries of layer 1 are not finite in torch.float32 on cpu", tmp_path / "inf")

    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(r"^--calibrate-with torch needs torch and transformers; pip install 'edgekv\[convert\]'$", good)
