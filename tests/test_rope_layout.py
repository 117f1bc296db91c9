"""The order of K's channels per architecture: the table, where it comes from, and what it is used for."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekv import rope_layout
from edgekv.errors import EdgekvError

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "edgekv" / "rope_layout.json"


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """The pinned source, without patches."""
    spec = importlib.util.spec_from_file_location("llama_source", ROOT / "tools" / "llama_source.py")
    llama_source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama_source)
    folder = tmp_path_factory.mktemp("pinned")
    llama_source.unpack_source(llama_source.read_pin(), folder)
    return folder / "llama.cpp"


vectors = hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(1, 16).map(lambda n: 2 * n)))


@given(vectors)
def test_each_undoes_the_other(v):
    for one, other in ((rope_layout.halves_to_pairs, rope_layout.pairs_to_halves),
                       (rope_layout.pairs_to_halves, rope_layout.halves_to_pairs)):
        assert one(other(v)).tobytes() == v.tobytes() and one(v).shape == v.shape


@given(vectors)
def test_what_is_rotated_together(v):
    """Channels i and i + d/2 become 2i and 2i + 1."""
    half = v.shape[-1] // 2
    pairs = rope_layout.halves_to_pairs(v)
    for i in range(half):
        assert pairs[..., 2 * i].tobytes() == v[..., i].tobytes()
        assert pairs[..., 2 * i + 1].tobytes() == v[..., i + half].tobytes()


@pytest.mark.parametrize("architecture, expected", [
    # as conversion/ says to a reader: a class that calls permute(), or does not
    ("llama", True), ("granite", True), ("granitehybrid", True), ("smollm3", True), ("arcee", True), ("mistral3", True),
    ("minicpm", True), ("internlm2", True), ("baichuan", True), ("olmo", True), ("deci", True), ("bailingmoe", True),
    ("qwen2", False), ("qwen3", False), ("qwen3moe", False), ("qwen3next", False), ("gemma", False), ("gemma2", False),
    ("gemma3", False), ("phi2", False), ("phi3", False), ("stablelm", False), ("gptneox", False), ("falcon", False),
    ("starcoder2", False), ("olmo2", False), ("nemotron", False), ("exaone", False), ("exaone4", False), ("glm4", False),
    ("command-r", False), ("cohere2", False), ("gpt-oss", False), ("hunyuan-dense", False), ("ernie4_5", False),
    ("seed_oss", False), ("lfm2", False), ("jamba", False), ("falcon-h1", False), ("bailingmoe2", False),
    ("dots1", False), ("afmoe", False), ("llama4", False), ("apertus", False), ("orion", False),
])
def test_architectures(architecture, expected):
    assert rope_layout.permuted(architecture) is expected


@pytest.mark.parametrize("architecture, why", [
    ("deepseek2", "MLA"), ("qwen2vl", "M-RoPE"), ("talkie", "another order of channels"), ("gpt-17", "does not know it"),
])
def test_undecided_architectures(architecture, why):
    with pytest.raises(EdgekvError, match=f"architecture '{architecture}': .* not known .*{why}.*calibrate instead") as e:
        rope_layout.permuted(architecture)
    assert "\n" not in str(e.value)


def test_the_table_is_the_pins():
    table = json.loads(TABLE.read_text())
    pin = json.loads((ROOT / "patches" / "pin.json").read_text())
    assert table["pin"] == {"name": pin["name"], "version": pin["version"]}
    assert not table["architectures"].keys() & table["undecided"].keys()


# --- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_is_what_the_pinned_converter_does(pinned, tmp_path):
    pytest.importorskip("transformers")
    run = subprocess.run([sys.executable, ROOT / "tools" / "rope_layout.py", "--tree", pinned, "-o", tmp_path / "t.json"],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, committed = json.loads((tmp_path / "t.json").read_text()), json.loads(TABLE.read_text())

    def decisions(table):  # other versions of transformers have other classes
        return {arch: entry["permuted"] for arch, entry in table["architectures"].items()}, table["pin"]

    assert decisions(found) == decisions(committed) and found["undecided"].keys() == committed["undecided"].keys()


@pytest.mark.slow
def test_permuted_architectures_rotate_pairs(pinned):
    """What the runtime says of its rotation fits: pairs (NORM), or no rotation, wherever the conversion permutes."""
    enums = dict(re.findall(r"\{ (LLM_ARCH_\w+), +\"([\w.-]+)\" +\}", (pinned / "src" / "llama-arch.cpp").read_text()))
    source = (pinned / "src" / "llama-model.cpp").read_text().split("llama_rope_type llama_model_rope_type(")[1]
    rotation, waiting = {}, []
    for case, returned in re.findall(r"case (LLM_ARCH_\w+):|return .*?LLAMA_ROPE_TYPE_(\w+);", source.split("\n}")[0]):
        if case:
            waiting.append(enums.get(case))
        else:
            rotation.update(dict.fromkeys(waiting, returned))
            waiting.clear()
    assert {rotation[name] for name in ("llama", "qwen3", "mamba")} == {"NORM", "NEOX", "NONE"}
    permuted = {arch for arch, entry in json.loads(TABLE.read_text())["architectures"].items() if entry["permuted"]}
    assert len(permuted) > 10 and {rotation[arch] for arch in permuted} == {"NORM", "NONE"}


_TINY = dict(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind, more", [
    ("llama", {}), ("qwen3", {}), ("gemma3_text", {"layer_types": ["full_attention"] * 2}), ("stablelm", {}),
    # these rotate pairs in transformers too
    ("cohere", {}), ("cohere2", {"layer_types": ["full_attention"] * 2}), ("glm", {}), ("glm4", {}), ("ernie4_5", {}),
    ("llama4_text", {"intermediate_size_mlp": 32, "moe_layers": []}),
])
def test_transformers_caches_k_in_the_order_of_its_rows(kind, more):
    """At position 0, where a rotation changes nothing, a cached key is the projection's output, but for its norm."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**_TINY, **more}))
    projected = []
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_hook(lambda _module, _inputs, output: projected.append(output[0, 0].reshape(2, 16)))
    with torch.no_grad():
        cache = model(torch.tensor([[5, 7, 9]]), use_cache=True).past_key_values
    assert len(projected) == 2
    for i, expected in enumerate(projected):
        cached = cache.layers[i].keys[0, :, 0]
        assert torch.nn.functional.cosine_similarity(cached, expected, dim=-1).min() > 0.999
