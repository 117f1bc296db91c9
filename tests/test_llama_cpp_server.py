"""``edgekv.Llama`` inside llama-cpp-python's own server, as docs/serving.md shows it."""

import json

import pytest

import edgekv
from tinymodel import write_tiny_model

import llama_cpp

for package in ("fastapi", "httpx", "pydantic_settings", "sse_starlette", "starlette_context", "uvicorn"):
    pytest.importorskip(package)

BUDGET, UBATCH, N_CTX = 64, 32, 1024
PROMPT = " ".join(f"word{i}" for i in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("server") / "tiny.gguf"))


@pytest.fixture(scope="module")
def server(model):
    """A client of the app, and the Llama that it made."""
    from fastapi.testclient import TestClient
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    made = []

    class Evicting(edgekv.Llama):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, kv_evict="streaming", kv_budget=BUDGET, **kwargs)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "Llama", Evicting)  # which the server looks up when it loads a model
        app = create_app(
            server_settings=ServerSettings(),
            model_settings=[ModelSettings(model=model, model_alias="tiny", n_ctx=N_CTX, n_batch=UBATCH, n_ubatch=UBATCH,
                                          n_threads=1, n_threads_batch=1, chat_format="chatml", verbose=False)])
        with TestClient(app) as client:
            yield client, made[0]


def own(model, **settings):
    return edgekv.Llama(model, n_ctx=N_CTX, n_batch=UBATCH, n_ubatch=UBATCH, n_threads=1, n_threads_batch=1, **settings)


ASK = {"max_tokens": 12, "temperature": 0, "repeat_penalty": 1.0}


def test_a_completion(server, model):
    client, llama = server
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **ASK})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 4 * (BUDGET + UBATCH)
    # the cache is a bounded one, and what it holds made the difference
    stats = llama.stats()
    assert stats.n_evictions > 0 and stats.cells_used <= BUDGET + UBATCH
    text = answer.json()["choices"][0]["text"]
    assert text == own(model, kv_evict="streaming", kv_budget=BUDGET)(PROMPT, **ASK)["choices"][0]["text"]
    assert text != own(model)(PROMPT, **ASK)["choices"][0]["text"]


def test_a_stream_is_the_same_answer_from_a_checkpoint(server):
    client, llama = server
    whole = client.post("/v1/completions", json={"prompt": PROMPT, **ASK}).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True, **ASK}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == whole
    assert llama.timings["cache_n"] > 0


def test_a_chat(server):
    client, llama = server
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, **ASK})
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert llama.stats().cells_used <= BUDGET + UBATCH
    bad = client.post("/v1/completions", json={"prompt": "word " * 2000, **ASK})
    assert bad.status_code == 400 and "context" in bad.json()["error"]["message"]
