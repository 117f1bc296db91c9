"""Runs the tests of llama.cpp's server on one local model and without a network: ``pytest -p upstream_plugin unit``.

For tools/server-tests, which starts pytest in the folder of those tests (tools/server/tests of the pinned source).
EDGEKV_SERVER_TEST_MODEL names the model that stands for theirs, EDGEKV_SERVER_TEST_TINY another with shorter tokens;
EDGEKV_SERVER_TEST_FOLDER is one that may be written to.

A test that wants a model or picture of its own from the network is skipped, with a reason that starts with "download".
"""

import functools
import os
import signal
import urllib.parse
from pathlib import Path

import pytest
import requests
import utils  # theirs; imported before their tests do "from utils import *"

MODEL = os.environ["EDGEKV_SERVER_TEST_MODEL"]
TINY = os.environ["EDGEKV_SERVER_TEST_TINY"]
FOLDER = Path(os.environ["EDGEKV_SERVER_TEST_FOLDER"])

# their texts have to be long in tokens, or the first token to be 1
SHORT_TOKENS = ("test_ctx_shift.py", "test_nocache_long_input_prompt", "test_tokenize_with_bos")
# presets whose model has what no text model has
KINDS = {"jina_reranker_tiny": "a reranker", "tinygemma3": "a model with vision"}
# the router finds these in the cache, and loads them by name
ROUTED = ("ggml-org/tinygemma3-GGUF:Q8_0", "ggml-org/test-model-stories260K:F32",
          "ggml-org/test-model-stories260K-infill:F32")
# the server itself would fetch
FETCHED = {"test_router_download_model": "a model", "test_router_delete_model": "a model",
           "test_mcp_proxy": "example.com"}


def skip_download(what: str) -> None:
    pytest.skip(f"download: {what}")


def local(name: str, preset):
    """The preset with the local model."""

    @functools.wraps(preset)
    def make():
        server = preset()
        if name == "router":
            server.models_preset = str(routed_models())
        else:
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = model()
        if name.startswith("bert"):
            server.pooling = "mean"  # their model says so itself
        server.wants = KINDS.get(name)
        return server

    return staticmethod(make)


def model() -> str:
    """The model for the test that runs."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    return TINY if any(name in test for name in SHORT_TOKENS) else MODEL


def routed_models() -> Path:
    path = FOLDER / "models.ini"
    path.write_text("".join(f"[{name}]\nmodel = {MODEL}\n\n" for name in ROUTED))
    return path


def guarded(start):
    """``ServerProcess.start``, but for servers that would download their model."""

    @functools.wraps(start)
    def guarded_start(self, *args, **kwargs):
        if what := getattr(self, "wants", None):
            skip_download(what)
        for what in (self.model_hf_repo, self.model_url, self.mmproj_url):
            if what:
                skip_download(what)
        if self.models_preset and Path(self.models_preset) != FOLDER / "models.ini":
            skip_download("models that a file of presets names")
        return start(self, *args, **kwargs)

    return guarded_start


def checked(stop):
    """``ServerProcess.stop``, which also says if a signal had ended the server; in the words of their ``start``."""

    @functools.wraps(stop)
    def checked_stop(self):
        process = self.process
        before = process.poll() if process else None
        stop(self)
        code = process.returncode if process else None
        asked = (-signal.SIGTERM, -signal.SIGKILL) if before is None else ()  # what stop() sends
        if code is not None and code < 0 and code not in asked:
            raise RuntimeError(f"Server process died with return code {code}")

    return checked_stop


def guarded_request(request):
    """``requests.Session.request`` on this machine only."""

    @functools.wraps(request)
    def local_request(self, method, url, *args, **kwargs):
        host = urllib.parse.urlsplit(url).hostname
        if host not in ("127.0.0.1", "::1", "localhost"):
            skip_download(url.rsplit("/", 1)[-1])
        if (kwargs.get("timeout") or 0) >= 10:  # a limit, not what is tested; this machine may be busier than theirs
            kwargs["timeout"] = 600
        return request(self, method, url, *args, **kwargs)

    return local_request


for preset_name, attribute in list(vars(utils.ServerPreset).items()):
    if isinstance(attribute, staticmethod) and preset_name != "load_all":
        setattr(utils.ServerPreset, preset_name, local(preset_name, attribute.__func__))
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerProcess.start = guarded(utils.ServerProcess.start)
utils.ServerProcess.stop = checked(utils.ServerProcess.stop)
utils.download_file = lambda url, *_: skip_download(url.rsplit("/", 1)[-1])
requests.Session.request = guarded_request(requests.Session.request)


def pytest_collection_modifyitems(items):
    for item in items:
        if what := FETCHED.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=f"download: {what}"))
