"""llama-server with eviction: going back, copies, states, and what clients get wrong. Plain HTTP, tiny random models.

Answers are held against sessions that no server drives: what a slot read, in which batches, and where it was cut comes
from the server's trace, and everything else is computed anew (tests/traced.py)."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgekv
from edgekv.calibrate import default_text
from edgekv.session import Session, Vocabulary
from edgekv.settings import EvictionSettings, SelectionSettings
from served import Served, llama_server, served  # noqa: F401  the fixture
from tinymodel import write_tiny_model
from traced import Replay
from unpatched import unpatched_server

N_CTX = 1024  # per slot
BUDGET, WINDOW, N_UBATCH = 64, 16, 32
EVICTION = EvictionSettings("knorm", BUDGET, WINDOW, 4)
EVICT = ("--kv-evict", "knorm", "--kv-budget", BUDGET, "--kv-window", WINDOW)
SHAPES = {"llama": {}, "gemma3": dict(n_layer=4), "lfm2": dict(n_layer=4, n_embd=128)}


def flags(n_slots: int = 1, n_ctx: int = N_CTX) -> list:
    return ["-np", n_slots, "-c", n_ctx * n_slots, "-ub", N_UBATCH, "-b", N_UBATCH, "-fa", "on", "-fit", "off",
            "--no-kv-unified", "--cache-ram", 64, "--slots"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    return {arch: write_tiny_model(folder / f"{arch}.gguf", arch=arch, **shape) for arch, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def plain(models):
    return models["llama"]


@pytest.fixture(params=SHAPES)
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """Slow enough for a client to leave while it works."""
    path = tmp_path_factory.mktemp("serve") / "slow.gguf"
    return write_tiny_model(path, n_embd=768, n_ff=3072, n_layer=4, n_ctx=8192)


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(3, 320, n).tolist()


class Witness:
    """Asks a server of eviction, and holds all of its answers against a session in the end."""

    def __init__(self, server: Served, model, n_slots: int = 1, n_ctx: int = N_CTX, **options):
        self.server, self.model = server, model
        self.options = dict(n_ctx=n_ctx, n_seq_max=n_slots, n_ubatch=N_UBATCH, n_threads=1, flash_attn=True,
                            settings=EVICTION) | options
        self.asked: list[tuple[int, list[int], list[int]]] = []

    def ask(self, prompt: list[int], n: int = 12, **fields) -> dict:
        answer = self.server.complete(prompt, n, **fields)
        self.heard(prompt, answer)
        return answer

    def heard(self, prompt: list[int], answer: dict) -> None:
        assert answer["tokens_evaluated"] == len(prompt) and answer["tokens"], answer
        self.asked.append((answer["id_slot"], prompt, answer["tokens"]))

    def check(self) -> None:
        """Stops the server."""
        self.server.idle()
        slots = self.server.cache()["slots"]
        self.server.stop()
        with Session(self.model, **self.options) as session:
            replay = Replay(session, self.server.trace)
            for slot, prompt, answer in self.asked:
                assert replay.answer(slot, prompt, len(answer)) == answer
            for slot in slots:
                held = session.stats(slot["id"])
                assert (slot["tokens_seen"], slot["cells_used"], slot["floor"]) == (
                    held.tokens_seen, held.cells_used, held.floor), slot


# --- going back ------------------------------------------------------------------------------------------------------


def test_another_question_about_the_same_document(llama_server, model):
    with served(llama_server, model, *flags(), *EVICT) as server:
        w = Witness(server, model)
        document = text(600)
        first = w.ask(document + text(9, 1))
        assert first["timings"]["cache_n"] == 0 and first["timings"]["prompt_n"] == 609
        assert server.cache()["slots"][0]["evictions"] > 0
        for seed in (2, 3):
            again = w.ask(document + text(8, seed), 40)["timings"]
            assert again["prompt_n"] <= 8 + N_UBATCH and again["cache_n"] + again["prompt_n"] == 608, again
        w.check()


def test_a_shared_beginning_that_ends_anywhere(llama_server, model):
    """Below the floor stock would remove a tail, which an evicted cache refuses: the process aborts then."""
    with served(llama_server, model, *flags(), *EVICT) as server:
        w = Witness(server, model)
        document = text(600)
        for n_shared in (599, 590, 575, 560, 530, 500, 400, 96, 80, 64, 16, 3, 1):
            w.ask(document, 3)
            w.ask(document[:n_shared] + text(20, n_shared), 3)
        w.check()


def test_the_same_prompt_again(llama_server, model):
    """Also after an answer that took the prompt's end out of reach. One token of it has to be read for its logits."""
    with served(llama_server, model, *flags(), *EVICT) as server:
        w = Witness(server, model)
        for n in (5, 96, 97, 300):
            prompt = text(n)
            first = w.ask(prompt, 200)
            for n_answer in (200, 5, 200):
                again = w.ask(prompt, n_answer)
                assert again["tokens"] == first["tokens"][:n_answer]
                assert again["timings"]["prompt_n"] == 1 and again["timings"]["cache_n"] == n - 1, again["timings"]
        w.check()


def test_an_answer_is_continued(llama_server, model):
    """A conversation: each prompt is the last one, its answer and a little more."""
    with served(llama_server, model, *flags(), *EVICT) as server:
        w = Witness(server, model)
        prompt = text(70)
        for turn in range(6):
            answer = w.ask(prompt, 50)
            assert answer["timings"]["cache_n"] == (len(prompt) - 11 if turn else 0)  # its last token was never read
            prompt = prompt + answer["tokens"] + text(10, turn)
        w.check()


@pytest.mark.parametrize("cache_ram", (64, 0))
def test_conversations_in_turns(llama_server, model, cache_ram):
    """One slot, two documents: the prompt cache keeps the one that is not in it, if it may."""
    with served(llama_server, model, *flags(), "--cache-ram", cache_ram, *EVICT) as server:
        w = Witness(server, model)
        a, b = text(400, 1), text(500, 2)
        first = {}
        for i, document in enumerate((a, b, a, b, a)):
            answer = w.ask(document)
            assert first.setdefault(len(document), answer["tokens"]) == answer["tokens"]
            expected = 1 if i > 1 and cache_ram else len(document)
            assert answer["timings"]["prompt_n"] == expected, (i, answer["timings"])
        w.check()


def test_idle_slots_are_kept_too(llama_server, plain):
    """Every idle slot goes into the prompt cache when a request comes, by default; more conversations than slots."""
    with served(llama_server, plain, *flags(2), *EVICT) as server:
        w = Witness(server, plain, 2)
        documents = [text(200 + 50 * i, i) for i in range(4)]
        for turn in range(3):
            for i, document in enumerate(documents):
                answer = w.ask(document + text(5, 10 * turn + i))
                assert not turn or answer["timings"]["prompt_n"] <= 5 + N_UBATCH, (turn, i, answer["timings"])
        w.check()


def test_selection_and_eviction(llama_server, plain):
    select = ("--kv-select", "quest", "--kv-select-budget", 32, "--kv-page-size", 8, "--kv-dense-layers", 1)
    with served(llama_server, plain, *flags(2), *EVICT, *select) as server:
        w = Witness(server, plain, 2, selection=SelectionSettings("quest", 32, 8, 1))
        for seed in (1, 2, 1):
            answer = w.ask(text(300, seed), 60)
            assert answer["timings"]["kv_read_per_step"] < answer["timings"]["kv_cells_used"]
        totals = server.cache()["totals"]
        assert 0 < totals["pages_read_total"] < totals["pages_total"] and totals["select_steps_total"] > 0
        w.check()


# --- several at once -------------------------------------------------------------------------------------------------


def test_two_conversations_at_once(llama_server, model):
    """Batches that hold tokens of two slots, and evictions in either."""
    with served(llama_server, model, *flags(2), *EVICT) as server:
        w = Witness(server, model, 2)

        def talk(slot):
            prompt = text(150, slot)
            for turn in range(4):
                answer = w.ask(prompt, 80, id_slot=slot)
                prompt = (prompt if turn % 2 else prompt + answer["tokens"]) + text(12, 10 * slot + turn)

        threads = [threading.Thread(target=talk, args=(slot,)) for slot in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(w.asked) == 8 and {slot for slot, *_ in w.asked} == {0, 1}
        w.check()
        mixed = [e for e in server.trace if len({slot for slot, *_ in e.get("decode", [])}) == 2]
        assert mixed, "the two never met in a batch"


@pytest.mark.parametrize("n", (20, 300))
def test_several_answers_to_one_prompt(llama_server, model, n):
    with served(llama_server, model, *flags(3), *EVICT) as server:
        w = Witness(server, model, 3)
        for seed in (1, 2):
            answers = server.complete(text(n, seed), 120, n_cmpl=3)
            assert len(answers) == 3 and len({a["id_slot"] for a in answers}) == 3
            for answer in answers:
                w.heard(text(n, seed), answer)
            # of the request, also in the slots that got the sequence of the first one
            assert all(0 <= a["timings"]["kv_evictions"] <= (n + 120) // N_UBATCH for a in answers)
        for slot in range(3):
            w.ask(text(n, 2) + text(7), 5, id_slot=slot)
        w.check()


# --- states in files -------------------------------------------------------------------------------------------------


def slot_action(server, action: str, filename: str | None = None, slot: int = 0):
    return server.post(f"/slots/{slot}?action={action}", {} if filename is None else {"filename": filename})


def test_a_slot_comes_back_from_a_file(llama_server, model, tmp_path):
    """It answers, in either slot, what one answers that was never saved."""
    with served(llama_server, model, *flags(2), *EVICT, "--slot-save-path", tmp_path) as server:
        prompt = text(300)
        more = prompt + server.complete(prompt, 30, id_slot=1)["tokens"] + text(9)
        want = server.complete(more, 40, id_slot=1)
        server.complete(prompt, 30, id_slot=0)
        before = server.cache()["slots"][0]
        saved = slot_action(server, "save", "a.bin").json
        assert saved["n_saved"] == 329 and saved["n_written"] == (tmp_path / "a.bin").stat().st_size
        assert slot_action(server, "erase").json["n_erased"] == 329
        assert server.cache()["slots"][0]["tokens_seen"] == 0
        for slot in (0, 1):
            assert slot_action(server, "restore", "a.bin", slot).json["n_restored"] == 329
            after = server.cache()["slots"][slot]
            assert after["tokens_seen"] == 329 and after["cells_used"] == before["cells_used"]
            got = server.complete(more, 40, id_slot=slot)
            assert got["timings"]["cache_n"] == 329 and got["tokens"] == want["tokens"]


OTHERS = {"budget": ("--kv-evict", "knorm", "--kv-budget", 80, "--kv-window", 16),
          "policy": ("--kv-evict", "keydiff", "--kv-budget", 64, "--kv-window", 16),
          "window": ("--kv-evict", "knorm", "--kv-budget", 64, "--kv-window", 8),
          "none": ()}


@pytest.mark.parametrize("other", OTHERS)
def test_a_slot_of_other_settings(llama_server, plain, tmp_path, other):
    """Refused with the reason, in both directions; nobody aborts and the slot answers as if it were new."""
    prompt = text(200)
    sides = {"ours": EVICT, "other": OTHERS[other]}
    fresh = {}
    for name, how in sides.items():
        with served(llama_server, plain, *flags(), *how, "--slot-save-path", tmp_path) as server:
            fresh[name] = server.complete(prompt)["tokens"]
            assert slot_action(server, "save", f"{name}.bin").status == 200
    for name, how in sides.items():
        foreign = "other.bin" if name == "ours" else "ours.bin"
        with served(llama_server, plain, *flags(), *how, "--slot-save-path", tmp_path) as server:
            server.complete(text(150, 1))
            reply = slot_action(server, "restore", foreign)
            assert reply.status == 400
            if how:  # a server without eviction says what stock says
                assert re.search("settings|polic|budget|window|evict", reply.error.split(":", 1)[1]), reply.error
            assert server.complete(prompt)["tokens"] == fresh[name]


def test_damaged_files_of_slots(llama_server, plain, tmp_path):
    with served(llama_server, plain, *flags(), *EVICT, "--slot-save-path", tmp_path) as server:
        prompt = text(200)
        want = server.complete(prompt)["tokens"]
        slot_action(server, "save", "good.bin")
        good = (tmp_path / "good.bin").read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        damaged = {"short.bin": good[:-100], "header.bin": good[:20], "empty.bin": b"", "flipped.bin": bytes(flipped),
                   "noise.bin": np.random.default_rng(0).bytes(5000)}
        for name, data in damaged.items():
            (tmp_path / name).write_bytes(data)
            reply = slot_action(server, "restore", name)
            assert reply.status == 400 and reply.error, name
            assert server.complete(prompt, cache_prompt=False)["tokens"] == want
        for name in ("missing.bin", "../good.bin", "", "a/b.bin"):
            assert slot_action(server, "restore", name).status == 400, name
        assert slot_action(server, "restore").status == 400
        assert slot_action(server, "restore", "good.bin").status == 200
        assert server.complete(prompt)["tokens"] == want


# --- the rest of the server ------------------------------------------------------------------------------------------


def test_infill_with_another_beginning(llama_server, plain):
    """Its prompts share beginnings too, and end anywhere."""
    fim = ",".join(f"tokenizer.ggml.fim_{part}_token_id=int:{300 + i}" for i, part in enumerate(("pre", "suf", "mid")))
    with served(llama_server, plain, *flags(), *EVICT, "--override-kv", fim) as server:
        words = "abcdefghij " * 40
        for prefix, suffix in ((words, "end"), (words[:300] + "!", "end"), (words[:150], "other end"), (words, "end")):
            reply = server.post("/infill", {"input_prefix": prefix, "input_suffix": suffix, "n_predict": 120,
                                            "temperature": 0, "ignore_eos": True, "return_tokens": True})
            assert reply.status == 200 and len(reply.json["tokens"]) == 120, reply.body
        assert server.cache()["slots"][0]["evictions"] > 0


def test_a_full_context_ends_the_answer(llama_server, model):
    with served(llama_server, model, *flags(2, 256), *EVICT) as server:
        w = Witness(server, model, 2, 256)
        for n in (200, 255):
            answer = w.ask(text(n), -1)
            assert answer["truncated"] and answer["stop_type"] == "limit"
            assert len(answer["tokens"]) in (256 - n, 257 - n)
        w.ask(text(30))
        w.check()


def test_keep_is_each_slots_own(llama_server, plain):
    """n_keep of a request pins so many of its first tokens, and BOS as stock counts it, whatever others pin."""
    with served(llama_server, plain, *flags(2), *EVICT) as server:
        w = Witness(server, plain, 2)
        for slot, n_keep in ((0, 20), (1, 9)):
            w.ask(text(300, slot), 30, id_slot=slot, n_keep=n_keep)
        assert [s["keep"] for s in server.cache()["slots"]] == [21, 10]
        w.ask(text(300, 0) + text(5), 30, id_slot=0)
        assert [s["keep"] for s in server.cache()["slots"]] == [4, 10]
        for n_keep in (-1, BUDGET - WINDOW + 1, BUDGET, 10**6, 2**31 - 1):
            reply = server.post("/completion", {"prompt": text(100), "n_keep": n_keep, "n_predict": 3})
            assert reply.status == 400 and "n_keep" in reply.error
        w.ask(text(100), 200)
        w.ask(text(300, 2), 30, id_slot=0, n_keep=BUDGET - WINDOW)  # and no room for BOS
        assert server.cache()["slots"][0]["keep"] == BUDGET - WINDOW
        w.check()


def test_figures(llama_server, plain):
    """One set of figures, in three places; an answer has its own."""
    with served(llama_server, plain, *flags(2), *EVICT, "--metrics") as server:
        server.complete(text(500, 1), 30)
        server.complete(text(500, 1)[:100] + text(50, 2), 100)
        answer = server.complete(text(300, 3), 50)["timings"]
        server.idle()
        cache = server.cache()
        assert cache["enabled"] and cache["selection"] is None
        assert cache["eviction"] == {"policy": "knorm", "budget": BUDGET, "window": WINDOW}
        totals, slots = cache["totals"], cache["slots"]
        metrics = dict(re.findall(r"^edgekv:(\w+) (\S+)$", server.get("/metrics").body.decode(), re.M))
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(totals)
        for name in ("tokens_seen", "cells_used", "cells_allocated", "checkpoints", "checkpoint_bytes"):
            assert totals[name] == sum(s[name] for s in slots), name
        assert totals["evictions_total"] == sum(s["evictions"] for s in slots) > 0
        slot = next(s for s in slots if s["tokens_seen"] == 349)
        assert (answer["kv_tokens_seen"], answer["kv_cells_used"]) == (349, slot["cells_used"])
        assert answer["kv_evictions"] == slot["evictions"] and answer["kv_bytes"] == totals["kv_bytes"]
        assert all(v >= 0 for v in answer.values())
        with Session(plain, n_ctx=N_CTX, n_seq_max=2, n_ubatch=N_UBATCH, n_threads=1, flash_attn=True,
                     settings=EVICTION) as session:
            stats = session.stats()
            assert (totals["kv_bytes"], totals["cells_allocated"]) == (stats.kv_bytes, 2 * stats.cells_allocated)
        *_, last = server.stream("/completion", {"prompt": text(300, 3), "n_predict": 5, "temperature": 0})
        # right before the answer's first token there is a checkpoint, or the floor allows it
        assert last["timings"]["kv_tokens_seen"] == 304 and last["timings"]["kv_checkpoint_used"] in (0, 1)


@pytest.mark.parametrize("mib", [64, 1])
def test_checkpoints_have_a_limit(llama_server, slow_model, mib):
    """--cache-ram bounds what a conversation keeps: half of it is for checkpoints."""
    limit = mib << 19
    had = []
    with served(llama_server, slow_model, *flags(1, 8192), "--cache-ram", mib, *EVICT) as server:
        for turn in range(1, 10):
            server.complete(text(900)[: 100 * turn], 2)
            had.append(server.cache()["totals"]["checkpoint_bytes"])
    assert max(had) <= limit
    # without a limit there would be more
    assert 0 < had[-1] and (max(had) > 1 << 19) == (mib > 1)


def test_figures_of_a_server_that_sleeps(llama_server, plain):
    """It has no cache; what it counted stays."""
    with served(llama_server, plain, *flags(1), *EVICT, "--metrics", "--sleep-idle-seconds", 4) as server:
        server.complete(text(300), 5)
        awake = server.cache()
        end = time.monotonic() + 30
        while server.cache()["slots"][0]["cells_used"]:
            assert time.monotonic() < end, "it does not fall asleep"
            time.sleep(0.1)
        asleep = server.cache()
        assert awake["totals"]["evictions_total"] == asleep["totals"]["evictions_total"] > 0
        assert awake["totals"]["kv_bytes"] > 0 == asleep["totals"]["kv_bytes"]
        assert not any(value for name, value in asleep["slots"][0].items() if name != "n_ctx")
        server.complete(text(300), 5)
        again = server.cache()["totals"]
        assert again["kv_bytes"] == awake["totals"]["kv_bytes"]
        assert again["evictions_total"] == 2 * awake["totals"]["evictions_total"]


def test_sequences_in_one_cache(llama_server, plain):
    """Selection in a unified cache: each slot has its own cells, not all of them."""
    with served(llama_server, plain, "-np", 2, "-c", 2048, "--kv-unified", "-fit", "off", "--slots", "--cache-ram", 0,
                "--kv-select", "quest", "--kv-select-budget", 64) as server:
        timings = [server.complete(text(n), 5, id_slot=slot)["timings"] for slot, n in ((0, 300), (1, 200))]
        assert [t["kv_cells_used"] for t in timings] == [304, 204]
        assert [s["cells_used"] for s in server.cache()["slots"]] == [304, 204]
        assert server.cache()["totals"]["cells_used"] == 508


def test_off(llama_server, plain):
    with served(llama_server, plain, *flags(2)) as server:
        assert server.cache() == {"enabled": False}
        assert not [k for k in server.complete(text(50))["timings"] if k.startswith("kv_")]
        assert server.trace == []


@pytest.mark.slow
def test_off_is_off(llama_server, models):
    """Token by token what the unpatched server answers, with the probabilities of the first ones."""
    binary = unpatched_server()
    for arch, model in models.items():
        heard = []
        for server_binary in (binary, llama_server):
            with served(server_binary, model, *flags(2)) as server:
                heard.append([server.complete(prompt, 40, n_probs=3) for prompt in
                              (text(400), text(400)[:250] + text(60, 1), text(400), text(40, 2))])
        for a, b in zip(*heard):
            assert a["tokens"] == b["tokens"] and a["completion_probabilities"] == b["completion_probabilities"], arch
            assert a["timings"]["prompt_n"] == b["timings"]["prompt_n"]


# --- what clients get wrong ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(llama_server, plain):
    """A server of eviction that has answered before."""
    with served(llama_server, plain, *flags(2), *EVICT) as server:
        server.complete(text(300), 20)
        yield server


PROMPT = text(40, 9)


@pytest.fixture(scope="module")
def right_answer(plain):
    """By the Python wrapper, which has nothing to do with the server."""
    llama = edgekv.Llama(plain, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, n_threads=1, n_threads_batch=1,
                         flash_attn=True, kv_evict="knorm", kv_budget=BUDGET, kv_window=WINDOW)
    answer = []
    for token in llama.generate(PROMPT, temp=0.0, logits_processor=never_end(llama.token_eos())):
        answer.append(token)
        if len(answer) == 12:
            return answer


def never_end(eos: int):
    from llama_cpp import LogitsProcessorList

    def forbid(_tokens, logits):
        logits[eos] = -np.inf
        return logits

    return LogitsProcessorList([forbid])


def goes_on(server: Served, answer: list[int]) -> None:
    assert server.alive()
    assert server.complete(PROMPT, cache_prompt=False)["tokens"] == answer


BODIES = {"half": b'{"prompt": [1, 2', "word": b"nonsense", "empty": b"", "array": b"[]", "number": b"5",
          "null": b"null", "string": b'"text"', "not utf-8": b'{"prompt": "\xff\xfe"}', "nested": b"[" * 100_000,
          "two": b'{"prompt": [1]} {"prompt": [1]}'}


@pytest.mark.parametrize("path", ("/completion", "/v1/completions", "/v1/chat/completions"))
@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_are_no_object(busy, right_answer, path, body):
    reply = busy.post(path, BODIES[body])
    assert reply.status == 400, reply.body
    assert reply.error
    goes_on(busy, right_answer)


WRONG = {
    "/completion": [dict(prompt=None), dict(prompt=5), dict(prompt={"a": 1}), dict(prompt=[]), dict(prompt=[["x", {}]]),
                    dict(prompt=[1, 99999]), dict(prompt=[-1]), dict(prompt=[1.5]), dict(n_predict="ten"),
                    dict(n_predict=-5), dict(temperature="hot"), dict(top_k="x"), dict(seed="x"), dict(stream="yes"),
                    dict(stop=[5]),
                    dict(n_keep="x"), dict(n_keep=[]), dict(cache_prompt="x"), dict(n_cmpl=99), dict(n_cmpl="a"),
                    dict(n_cmpl=0), dict(grammar="root ::= ("), dict(json_schema=5), dict(json_schema={"type": "nope"}),
                    dict(lora=5), dict(n_probs="x"), dict(samplers=[5]), dict(timings_per_token=5)],
    "/v1/chat/completions": [dict(messages=None), dict(messages="hello"), dict(messages=[1]),
                             dict(messages=[{"role": "user"}]), dict(messages=[{"content": "x"}]),
                             dict(messages=[{"role": 5, "content": "x"}]),
                             dict(messages=[{"role": "user", "content": 5}]),
                             dict(messages=[{"role": "user", "content": [
                                 {"type": "image_url", "image_url": {"url": "x"}}]}]),
                             dict(max_tokens="x"), dict(tools="x"), dict(tools=[5]), dict(tools=[{"type": "function"}]),
                             dict(tool_choice="sometimes"), dict(response_format={"type": "x"}), dict(n="x"),
                             dict(logprobs="x"), dict(reasoning_format=5), dict(stream=5),
                             dict(stream=True, stream_options={"include_usage": "x"})],
}


@pytest.mark.parametrize("path,field", [(p, f) for p, fields in WRONG.items() for f in fields],
                         ids=lambda v: json.dumps(v)[:60])
def test_wrong_types(busy, right_answer, path, field):
    good = {"/completion": {"prompt": [1, 5], "n_predict": 2},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}}[path]
    reply = busy.post(path, {**good, **field})
    assert reply.status == 400, reply.body
    assert reply.json["error"]["message"] and reply.json["error"]["code"] == 400
    goes_on(busy, right_answer)


def test_a_prompt_over_the_limit(busy, right_answer):
    for n in (N_CTX, 5000):
        reply = busy.post("/completion", {"prompt": text(n)})
        assert reply.status == 400 and str(n) in reply.error and str(N_CTX) in reply.error
        assert reply.json["error"]["type"] == "exceed_context_size_error"
        goes_on(busy, right_answer)
    assert busy.complete(text(N_CTX - 1), 1)["tokens"]


HEAD = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": [1, 2, 3], "n_predict": 2}).encode()
LIES = {"longer, then closed": (b"Content-Length: 500\r\n\r\n" + BODY, True),
        "shorter": (b"Content-Length: 9\r\n\r\n" + BODY, True),
        "negative": (b"Content-Length: -3\r\n\r\n" + BODY, True),
        "a word": (b"Content-Length: abc\r\n\r\n" + BODY, True),
        "huge": (b"Content-Length: 99999999999999999999\r\n\r\n" + BODY, True),
        "larger than memory": (b"Content-Length: 9999999999999\r\n\r\n" + BODY, True),
        "none": (b"\r\n" + BODY, True),
        "two": (b"Content-Length: 2\r\nContent-Length: 35\r\n\r\n" + BODY, True),
        "no chunk": (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY, True)}


@pytest.mark.parametrize("lie", LIES)
def test_lengths_that_are_lies(busy, right_answer, lie):
    data, end = LIES[lie]
    answers = busy.raw(HEAD + data, end=end)
    head, _, body = answers.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 4\d\d ", head), answers
    assert json.loads(body.split(b"HTTP/1.1")[0])["error"]["message"], answers
    goes_on(busy, right_answer)


def test_what_is_no_http(busy, right_answer):
    for data in (b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00" + bytes(300), b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50):
        busy.raw(data, end=True)
        goes_on(busy, right_answer)
    assert busy.get("/nowhere").status == 404 and busy.get("/nowhere").error
    goes_on(busy, right_answer)


def decoded(server: Served) -> int:
    return sum(len(event.get("decode", [])) for event in server.trace)


def test_a_client_leaves_in_mid_stream(llama_server, slow_model):
    """The slot stops long before the answer's end, and goes on with what it has."""
    with served(llama_server, slow_model, *flags(1, 8192), *EVICT) as server:
        w = Witness(server, slow_model, n_ctx=8192)
        prompt = text(200)
        connection, answer = server.open_stream("/completion", {"prompt": prompt, "n_predict": 7000, "temperature": 0,
                                                                "ignore_eos": True})
        assert answer.status == 200
        answer.read(200)
        connection.close()
        answer.close()
        server.idle(60)
        assert decoded(server) < 200 + 6900
        w.ask(prompt, 5)
        w.ask(text(60, 1), 5)
        w.check()


def test_a_client_leaves_in_mid_prompt(llama_server, slow_model):
    with served(llama_server, slow_model, *flags(1, 8192), *EVICT) as server:
        w = Witness(server, slow_model, n_ctx=8192)
        prompt = text(8000)
        for _ in range(2):
            had = decoded(server)
            connection = server.connect()
            connection.request("POST", "/completion", json.dumps({"prompt": prompt, "n_predict": 1}),
                               {"Content-Type": "application/json"})
            end = time.monotonic() + 60
            while decoded(server) == had:
                assert server.process.poll() is None and time.monotonic() < end, "it does not begin to read"
                time.sleep(0.05)
            connection.close()
            server.idle(60)
            assert decoded(server) - had < 7900
        w.ask(prompt[:300], 5)
        w.check()


def test_keys(llama_server, plain):
    with served(llama_server, plain, *flags(), *EVICT, "--api-key", "right", "--metrics") as server:
        body = {"prompt": [1, 5], "n_predict": 2, "temperature": 0}
        want = server.post("/completion", body, Authorization="Bearer right")
        assert want.status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": ""},
                        {"X-Api-Key": "wrong"}, {"Authorization": "Bearer rightx"}):
            for reply in (server.post("/completion", body, **headers), server.get("/edgekv", **headers),
                          server.get("/metrics", **headers), server.get("/slots", **headers)):
                assert reply.status == 401 and "key" in reply.error.lower(), headers
        assert server.get("/health").status == 200
        assert server.get("/edgekv", **{"X-Api-Key": "right"}).json["enabled"]
        assert server.post("/completion", body, Authorization="Bearer right").json["content"] == want.json["content"]


# --- the load benchmark ----------------------------------------------------------------------------------------------

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "serve.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("serve_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_what_the_load_benchmark_calls_wrong(benchmark):
    secrets = {"123456", "234567", "345678"}
    said = [benchmark.conversation_record(0, turn, "123456", answer, secrets) for turn, answer in enumerate(
        ("The secret number is 123456.", "It is 234567.", "It is 1234567.", "No.", "99345678 or 12345 6"))]
    assert [a["own"] for a in said] == [True, False, True, False, False]
    assert [a["others"] for a in said] == [[], ["234567"], ["234567"], [], ["345678"]]

    fine = {"server": "a", "round": 1, "asked": 9, "requests": 9, "failures": [], "mixed": [], "own_share": 0.9}
    assert benchmark.wrong(fine) == []
    assert "234567" in benchmark.wrong({**fine, "mixed": [said[1]]})[0]
    assert "status 500" in benchmark.wrong({**fine, "failures": ["conversation 3, turn 1: status 500"]})[0]
    assert "20%" in benchmark.wrong({**fine, "own_share": 0.2})[0]
    assert "8 of 9 requests" in benchmark.wrong({**fine, "requests": 8})[0]

    samples = [(float(t), 2 * t, 100.0 if t < 25 else 50 + 0.5 * t) for t in range(101)]  # grows behind the warm-up
    slope = benchmark.memory_slope(samples, 200)
    assert slope["slope_per_min"] == pytest.approx(30) and slope["slope_per_100_requests"] == pytest.approx(25)
    assert (slope["after_requests"], slope["low"], slope["high"]) == (50, 62.5, 100.0)


def test_the_load_benchmark_says_what_it_lacks(benchmark, plain, monkeypatch):
    def fails(why, *args):
        monkeypatch.setattr(sys, "argv", ["serve.py", str(plain), *args])
        with pytest.raises(SystemExit) as ended:
            benchmark.main()
        assert why in str(ended.value) and "\n" not in str(ended.value), ended.value

    fails("/nowhere", "--server", "a=/nowhere")
    fails("write NAME=", "--server", "/bin/true")
    fails("twice", "--server", "a=/bin/true", "--server", "a=/bin/true")
    fails("no --server b", "--server", "a=/bin/true", "--flags", "b=-x")
    fails("-n", "--server", "a=/bin/true", "-n", "0")
    monkeypatch.setattr(benchmark, "conversations", lambda *_: [])
    fails("--server a: the server ended", "--server", "a=/bin/true")


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ("a message of its own", "one message"))
def test_the_second_question(llama_server, smollm2_qfilters, where):
    """6,000 tokens are read once: the next question starts in under a fifth of the first one's time."""
    with Vocabulary(smollm2_qfilters) as vocabulary:
        document = vocabulary.text(vocabulary.tokenize(default_text()[:40_000], special=False)[:6000])

    def messages(question):
        if where == "one message":
            return [{"role": "user", "content": f"{document}\n\n{question}"}]
        return [{"role": "user", "content": document}, {"role": "assistant", "content": "I have read it."},
                {"role": "user", "content": question}]

    with served(llama_server, smollm2_qfilters, "-np", 2, "-c", 16384, "-t", 2, "-fa", "on", "-fit", "off", "-ub", 512,
                "--kv-evict", "kvdiff+qfilters+recency", "--kv-budget", 1024) as server:
        began = {}
        for name, question, n in (("first", "What is a class?", 400), ("second", "What does with do?", 16),
                                  ("again", "What is a class?", 400), ("regenerated", "What is a class?", 16)):
            t = time.monotonic()
            start = None
            for event in server.stream("/v1/chat/completions", {"messages": messages(question), "max_tokens": n,
                                                                "temperature": 0, "ignore_eos": True}):
                if start is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                    start = time.monotonic() - t
                timings = event.get("timings") or {}
            began[name] = timings["prompt_n"], start, timings
        n_first, first, _ = began["first"]
        assert n_first > 6000 and began["first"][2]["kv_evictions"] > 0
        for name, (n, start, _) in began.items():
            print(f"{where}, {name}: {n} tokens read, first one after {start:.2f} s ({start / first:.3f} of the first)")
            assert name == "first" or n < 0.2 * n_first, (name, n)


@pytest.mark.slow
def test_load(llama_server, tmp_path, smollm2_qfilters):
    """The load benchmark, small, but with more clients than slots: nothing fails and nothing is mixed."""
    run = subprocess.run([sys.executable, str(BENCHMARK), str(smollm2_qfilters), "-n", "40", "-r", "1", "-o",
                          str(tmp_path / "load.json"), "--server", f"ours={llama_server}", "--flags",
                          "ours=--kv-evict kvdiff+qfilters+recency --kv-budget 512"], capture_output=True, text=True,
                         timeout=1200)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    [result] = json.loads((tmp_path / "load.json").read_text())["runs"]
    assert result["requests"] == 40 and not result["failures"] and not result["mixed"] and result["own_share"] >= 0.5
    assert max(a["kv_evictions"] for a in result["answers"]) > 0
