"""Images and sound through the bindings: the handlers of chats, with a projector of random weights."""

import base64
import struct
import subprocess

import gguf
import numpy as np
import pytest

import edgekv
from edgekv import EdgekvError, _runtime, media
from edgekv.gguf_file import GGUF
from process import fails, python
from served import llama_server, served  # noqa: F401  a fixture
from tinymodel import write_tiny_model, write_tiny_projector

from llama_cpp import llama_chat_format

real = pytest.mark.skipif(not _runtime.lib_path("mtmd").exists(), reason="built without libmtmd")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("media") / "tiny.gguf")


@pytest.fixture(scope="module")
def projector(tmp_path_factory):
    return write_tiny_projector(tmp_path_factory.mktemp("media") / "mmproj.gguf")


def image(seed: int) -> str:
    """A URL of 8x8 random pixels, as BMP."""
    pixels = np.random.default_rng(seed).integers(0, 256, 8 * 8 * 3, dtype=np.uint8).tobytes()
    head = b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    return "data:image/bmp;base64," + base64.b64encode(head + pixels).decode()


def message(text: str, url: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]}


SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


class Handler(llama_chat_format.Llava15ChatHandler):
    DEFAULT_SYSTEM_MESSAGE = None


def open_with(model, projector, handler=Handler, **options):
    return edgekv.Llama(model, n_ctx=512, n_threads=1, chat_handler=handler(str(projector), verbose=False), **options)


def first_logprobs(llama, messages) -> np.ndarray:
    """Of the answer's first token, over the vocabulary."""
    seen = []

    def see(_tokens, logits):
        seen.append(np.array(logits, np.float64))
        return logits

    llama.create_chat_completion(messages, max_tokens=1, temperature=0, repeat_penalty=1, logits_processor=[see])
    return seen[0] - np.log(np.exp(seen[0] - seen[0].max()).sum()) - seen[0].max()


# --- what works ------------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("selection", ("none", "quest"))
def test_an_image_is_seen_as_the_server_sees_it(model, projector, llama_server, capfd, selection):  # noqa: F811
    """Through the bindings and through llama-server, from one text: other images, other answers, and the same ones."""
    llama = open_with(model, projector, selection=selection)
    ours = [first_logprobs(llama, [message("what is it", image(seed))]) for seed in (1, 2, 1)]
    assert np.abs(ours[0] - ours[1]).max() > 0.01 and np.array_equal(ours[0], ours[2])
    assert capfd.readouterr() == ("", "")  # libmtmd writes pages otherwise

    flags = ("--kv-select", selection, "-fa", "off" if selection == "none" else "on")
    with served(llama_server, model, "-c", "512", "-np", "1", "--mmproj", projector, *flags) as server:
        marker = server.get("/props").json["media_marker"]
        for seed, logprobs in ((1, ours[0]), (2, ours[1])):
            # the handler's template loses its line feeds
            answer = server.complete({"prompt_string": f"USER: {marker}what is itASSISTANT: ",
                                      "multimodal_data": [image(seed).partition(",")[2]]}, 1, n_probs=20)
            top = answer["completion_probabilities"][0]["top_logprobs"]
            np.testing.assert_allclose([t["logprob"] for t in top], logprobs[[t["id"] for t in top]], rtol=0, atol=1e-4)
            assert top[0]["id"] == logprobs.argmax()


@real
def test_sound_without_ears(model, projector, llama_server):  # noqa: F811
    """What a projector, or no projector, cannot read is the client's mistake; the server goes on."""
    with served(llama_server, model, "-c", "512", "-np", "1") as blind:
        for part, kind in ((message("x", image(1))["content"][1], "image"), (SOUND, "audio")):
            reply = blind.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})
            assert reply.status == 400 and reply.error.startswith(f"{kind} input is not supported") and "mmproj" in reply.error
        assert blind.complete("x", 1)
    with served(llama_server, model, "-c", "512", "-np", "1", "--mmproj", projector) as deaf:
        for part, why in ((SOUND, "audio input is not supported"),
                          ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "Failed to load image")):
            reply = deaf.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})
            assert reply.status == 400 and reply.error.startswith(why)
        assert deaf.complete("x", 1)


@real
def test_nothing_is_said_at_the_end(model, projector):
    """The bindings free the projector when the interpreter has closed its standard output."""
    r = subprocess.run(python(f"import edgekv\nfrom llama_cpp.llama_chat_format import Llava15ChatHandler as H\n"
                              f"h = H({str(projector)!r}, verbose=False)\n"
                              f"a = edgekv.Llama({str(model)!r}, chat_handler=h, n_threads=1)\n"
                              f"a.create_chat_completion([{message('x', image(1))!r}], max_tokens=1)"),
                       capture_output=True, text=True, timeout=60)
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "")


def test_the_bindings_load_no_other_libmtmd():
    """The published package brings one of its own, which is for another libllama."""
    r = subprocess.run(python("import edgekv, os; print(os.environ['MTMD_CPP_LIB'])"), capture_output=True, text=True)
    assert r.stdout.strip() == str(_runtime.lib_dir()), r.stderr


def test_parts_of_text_are_a_text(model, smollm2):
    """In the default format they would be dropped, and most templates fail on them."""
    parts = [{"type": "text", "text": "hello"}, "or", {"type": "text", "text": "bye"}]
    for path in (model, smollm2):
        llama = edgekv.Llama(path, n_ctx=512, n_threads=1)
        one, many = ([{"role": "system", "content": "s"}, {"role": "user", "content": content}]
                     for content in ("hello\nor\nbye", parts))
        assert llama.chat_tokens(many) == llama.chat_tokens(one) != llama.chat_tokens([one[0], {**one[1], "content": ""}])
        said = [llama.create_chat_completion(m, max_tokens=4, temperature=0)["choices"] for m in (one, many)]
        assert said[0] == said[1]


def test_a_template_that_knows_only_parts_gets_them(tmp_path, model):
    template = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    path = with_template(model, tmp_path / "parts.gguf", template)
    llama = edgekv.Llama(path, n_ctx=512, n_threads=1)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert llama.detokenize(llama.chat_tokens([{"role": "user", "content": parts}])).endswith(b"<one><two>")


def with_template(src, dst, template):
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    writer = gguf.GGUFWriter(dst, "llama")
    copy_with_new_metadata(gguf.GGUFReader(src), writer, {
        "tokenizer.chat_template": MetadataDetails(gguf.GGUFValueType.STRING, template)}, [])
    return dst


def test_handlers_of_others_get_what_they_are_given(model):
    """Whoever writes one knows what it reads."""
    seen = []

    def handler(*, llama, messages, **_):
        seen.extend(messages)
        return llama.create_completion("x", max_tokens=1)

    llama = edgekv.Llama(model, n_ctx=512, n_threads=1, chat_handler=handler, kv_evict="streaming", kv_budget=128)
    llama.create_chat_completion([{"role": "user", "content": [SOUND]}])
    assert {"role": "user", "content": [SOUND]} in seen


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(EdgekvError) as refused:
        call(*args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, SOUND, {"type": "video"}, {}])
def test_what_nobody_reads_is_not_dropped(model, part):
    llama = edgekv.Llama(model, n_ctx=512, n_threads=1)
    for call in (llama.create_chat_completion, llama.chat_tokens):
        parts = [{"type": "text", "text": "x"}, part]
        line = refusal(call, [{"role": "user", "content": "hi"}, {"role": "user", "content": parts}])
        assert line.startswith(f"messages: a part of type '{part.get('type')}' cannot be read here; drop it, or give ")
        assert "chat_handler=" in line and "--mmproj" in line


@real
def test_images_are_not_evicted(model, projector, monkeypatch):
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_model_load_from_file", None)  # it is said before
    for mode in ("bounded", "prompt"):
        line = refusal(open_with, model, projector, kv_evict="streaming", kv_budget=64, kv_evict_mode=mode)
        assert line.startswith("chat_handler does not go with kv_evict='streaming': ") and line.endswith("drop one of them")
    monkeypatch.undo()
    llama = edgekv.Llama(model, n_ctx=512, n_threads=1, kv_evict="streaming", kv_budget=64)
    llama.chat_handler = Handler(str(projector), verbose=False)
    assert refusal(llama.create_chat_completion, [message("x", image(1))]) == line


@real
@pytest.mark.parametrize("handler", [llama_chat_format.Llava15ChatHandler, llama_chat_format.Qwen25VLChatHandler,
                                     llama_chat_format.Gemma4ChatHandler, llama_chat_format.MTMDChatHandler])
def test_wrong_projectors(model, projector, tmp_path, handler):
    line = refusal(open_with, model, model, handler)
    assert line == (f"chat_handler: {model}: is no projector of a multimodal model; give the file called mmproj that comes "
                    "with the model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(projector.read_bytes()[:-100])
    assert refusal(open_with, model, cut, handler).startswith(f"chat_handler: {cut}: truncated GGUF file")
    deaf = tmp_path / "sound.gguf"
    deaf.write_bytes(projector.read_bytes().replace(b"clip.has_vision_encoder", b"clip.has_odours_encoder"))
    assert f"{deaf}: has no encoder of images" in refusal(open_with, model, deaf, handler)
    assert "edgekv serve MODEL --mmproj" in refusal(open_with, model, deaf, handler)


@real
def test_a_projector_of_another_model(model, tmp_path):
    other = write_tiny_projector(tmp_path / "other.gguf", n_embd=32)
    llama = open_with(model, other)
    assert refusal(llama.create_chat_completion, [message("x", image(1))]) == (
        f"chat_handler: {other}: cannot be used with {model}: mismatch between text model (n_embd = 64) and mmproj "
        "(n_embd = 32)")
    new = tmp_path / "new.gguf"
    new.write_bytes(other.read_bytes().replace(b"\x03\0\0\0\0\0\0\0mlp", b"\x03\0\0\0\0\0\0\0xyz"))
    llama = open_with(model, new)
    assert refusal(llama.create_chat_completion, [message("x", image(1))]) == (
        f"chat_handler: {new}: cannot be used with {model}: unknown projector type: xyz")


@real
def test_the_bindings_handlers_take_no_sound(model, projector):
    """They would drop it."""
    llama = open_with(model, projector)
    line = refusal(llama.create_chat_completion, [{"role": "user", "content": [SOUND]}])
    assert line == ("messages: a part of type 'input_audio' cannot be read here; "
                    f"edgekv serve MODEL --mmproj {projector} takes sound")


def test_a_projector_is_no_model(projector, model):
    line = refusal(edgekv.Llama, projector)
    assert line.startswith(f"{projector}: is the projector of a multimodal model (mmproj), not a language model: name ")
    assert media.is_projector(projector) and not media.is_projector(model) and not media.is_projector(__file__)
    GGUF(model)


# --- texts in models that see ----------------------------------------------------------------------------------------


def test_m_rope(tmp_path):
    """Texts are read and selected from, not evicted."""
    path = write_tiny_model(tmp_path / "vl.gguf", arch="qwen2vl", n_head=2)
    why = "eviction is not possible: M-RoPE reads positions from the cells"
    assert why in refusal(edgekv.Llama, path, n_threads=1, kv_evict="streaming", kv_budget=64)
    fails(why, "run", path, "-p", "x", "-n", 2, "-c", 512, "-t", 1, "--kv-evict", "streaming", "--kv-budget", 64)
    said = []
    for selection in ("none", edgekv.SelectionSettings("quest", 100_000)):
        llama = edgekv.Llama(path, n_ctx=512, n_threads=1, flash_attn=True, selection=selection)
        said.append(llama.create_completion("x" * 300, max_tokens=20, temperature=0)["choices"])
    assert said[0] == said[1]
