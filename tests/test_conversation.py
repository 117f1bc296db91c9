"""Conversations on a real model, longer than its cache. The slow tests print the figures that they check (`-s` shows them)."""

import json
import os
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest

from edgekv.conversation import Conversation
from edgekv.errors import EdgekvError
from edgekv.llama import Llama
from edgekv.session_file import SavedSession
from edgekv.settings import RopeSettings
from process import EDGEKV, python
from replay import Recorded, greedy
from tinymodel import write_tiny_model

N_UBATCH = 512


@pytest.fixture(scope="module")
def model(smollm2_qfilters):
    return smollm2_qfilters


@pytest.fixture
def llama(model):
    llama = Recorded(model, n_ctx=8192, n_batch=N_UBATCH, n_ubatch=N_UBATCH, n_threads=2, n_threads_batch=2,
                     kv_evict="qfilters", kv_budget=1024)
    yield llama
    llama.close()


def document(llama, n: int) -> str:
    """English prose of about n tokens that every Python has."""
    from pydoc_data.topics import topics

    tokens = llama.tokenize("\n\n".join(topics[name] for name in sorted(topics)).encode(), add_bos=False)
    return llama.detokenize(tokens[:n]).decode(errors="ignore")


def tokens_of(llama, n_prompt: int, n: int) -> list[int]:
    """The first n tokens of the last answer."""
    return llama.input_ids[n_prompt : n_prompt + n].tolist()


def replayed_answer(llama, n: int) -> list[int]:
    """The last answer, from a fresh context that is led through the same batches up to the end of the prompt."""
    # the prompt's last batch is the one that is one token long and has the answer behind it
    singles = len(llama.log)
    while singles and llama.log[singles - 1][0] == "decode" and len(llama.log[singles - 1][1]) == 1:
        singles -= 1
    with llama.replayed(singles) as session:
        _, last, pos = llama.log[singles]
        logits = session.decode(last, pos, logits="last")
        return greedy(session, logits, pos + 1, n)


# --- the same document, three questions ------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_questions_read_the_document_once(llama):
    """Without state between the calls; answers equal those of fresh contexts that go through the same batches."""
    text = document(llama, 6000)
    times, n_read = [], []
    for question in ("What is an assertion in Python?", "Which words are reserved?", "How are exceptions handled?"):
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        prompt = llama.chat_tokens(messages)
        began = time.perf_counter()
        pieces = llama.create_chat_completion(messages, temperature=0, repeat_penalty=1, max_tokens=32, stream=True)
        first, timings = None, None
        for piece in pieces:
            if first is None and piece["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - began
            timings = piece.get("timings", timings)
        times.append(first)
        n_read.append(timings["prompt_n"])
        n = llama.n_tokens - len(prompt)
        assert len(prompt) > 6000 and timings["cache_n"] + timings["prompt_n"] == len(prompt) and n > 3
        assert replayed_answer(llama, n) == tokens_of(llama, len(prompt), n)
    print(f"\nstart of the answers after {times[0]:.2f}, {times[1]:.3f}, {times[2]:.3f} s "
          f"({times[1] / times[0]:.4f}, {times[2] / times[0]:.4f} of the first), tokens read {n_read}, "
          f"{llama.stats().n_evictions} evictions, {len(llama.checkpoints)} checkpoints of {llama.checkpoints.nbytes:,} bytes")
    assert n_read[0] > 6000 and max(n_read[1:]) < 100


# --- going back ------------------------------------------------------------------------------------------------------


def say(conversation, text=None) -> str:
    return "".join(conversation.ask(text) if text is not None else conversation.regenerate())


@pytest.mark.slow
def test_going_back(llama):
    """/regen of a 700-token answer, /undo twice, an edit of the last turn: each as a fresh context answers after the
    batches that made the checkpoint, and what is read again is a few tokens."""
    no_end = {llama.token_eos(): -1e9}
    conversation = Conversation(llama, sampling=dict(temperature=0, repeat_penalty=1, max_tokens=24))
    short, long = dict(conversation.sampling), dict(max_tokens=700, logit_bias=no_end)
    figures = []

    def check(what, n_known: int):
        n_prompt = llama.timings["cache_n"] + llama.timings["prompt_n"]
        n = min(llama.n_tokens - n_prompt, 50)
        assert replayed_answer(llama, n) == tokens_of(llama, n_prompt, n), what
        figures.append(f"{what}: {llama.timings['prompt_n']} of {n_prompt} tokens read")
        assert llama.timings["cache_n"] >= n_known
        return n_prompt

    say(conversation, document(llama, 2000) + "\n\nWhat is this text about?")
    n_first = check("first question", 0)
    first = conversation.messages[-1]["content"]
    say(conversation, "Tell me more.")
    n_second = check("second", n_first - 1)
    second = conversation.messages[-1]["content"]

    conversation.sampling.update(long)
    answer = say(conversation, "Write a long story about a lighthouse.")
    n_third = check("third", n_second - 1)
    assert llama.n_tokens - n_third == 699 and llama.stats().floor > n_third
    assert say(conversation) == answer
    assert llama.timings["prompt_n"] == 1
    check("/regen of 700 tokens", n_third - 1)

    conversation.sampling.clear()
    conversation.sampling.update(short)
    assert conversation.undo().startswith("Write a long story") and conversation.undo() == "Tell me more."
    assert say(conversation, "Tell me more.") == second
    check("/undo twice, the same again", n_first - 1)

    conversation.undo()
    say(conversation, "Which part of it is hardest?")
    check("an edit of the last turn", n_first - 1)
    conversation.undo()
    conversation.undo()
    say(conversation, document(llama, 2000) + "\n\nWhat is this text about?")
    check("/undo of all, the first again", n_first - 1)
    assert conversation.messages[-1]["content"] == first
    print("\n" + "\n".join(figures) + f"\n{len(llama.checkpoints)} checkpoints of {llama.checkpoints.nbytes:,} bytes")


# --- another process -------------------------------------------------------------------------------------------------

_TALK = """
import sys
from edgekv.conversation import Conversation
from edgekv.llama import Llama
model, path, first = sys.argv[1], sys.argv[2], sys.argv[3] == "first"
llama = Llama(model, n_ctx=4096, n_threads=2, n_threads_batch=2, kv_evict="qfilters", kv_budget=512)
conversation = Conversation(llama, sampling=dict(temperature=0, repeat_penalty=1, max_tokens=48))
if first:
    list(conversation.ask(sys.stdin.read()))
    conversation.save(path)
else:
    conversation.load(path)
print("".join(conversation.ask("And what else?")), end="")
print(llama.timings["cache_n"], file=sys.stderr)
"""


@pytest.mark.slow
def test_save_end_the_process_load(llama, model, tmp_path):
    path = tmp_path / "session"
    runs = [subprocess.run([*python(_TALK), str(model), str(path), which], capture_output=True, text=True,
                           input=document(llama, 2000) + "\n\nWhat is this?") for which in ("first", "second")]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    assert runs[0].stdout == runs[1].stdout != "" and [int(run.stderr) > 2000 for run in runs] == [True, True]
    print(f"\nsession file of {path.stat().st_size:,} bytes, the next {len(runs[0].stdout)} characters are the same")


# --- session files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def session_file(tmp_path):
    saved = SavedSession(np.arange(50, dtype=np.int32), np.arange(3000).astype(np.uint8),
                         [{"role": "user", "content": "a — ü"}], "fingerprint")
    saved.write(tmp_path / "session")
    return tmp_path / "session"


def test_session_files_come_back(session_file):
    back = SavedSession.read(session_file)
    assert back.tokens.tolist() == list(range(50)) and back.state.tolist() == np.arange(3000).astype(np.uint8).tolist()
    assert back.messages == [{"role": "user", "content": "a — ü"}] and back.model_sha256 == "fingerprint"
    assert os.listdir(session_file.parent) == ["session"]


def test_sessions_of_another_rope_scaling(smollm2, tmp_path):
    talks = [Conversation(Llama(smollm2, n_ctx=256, **RopeSettings.resolve(**rope).params()), sampling={"max_tokens": 4})
             for rope in ({}, {"rope_scaling": "yarn", "rope_scale": 2.0}, {"rope_scaling": "yarn", "rope_scale": 2.0})]
    for talk in talks[:2]:
        list(talk.ask("hello"))
    talks[0].save(tmp_path / "plain")
    talks[1].save(tmp_path / "stretched")
    talks[2].load(tmp_path / "stretched")
    assert talks[2].messages == talks[1].messages
    for talk, name, there in ((talks[2], "plain", "that of the model"), (talks[0], "stretched", "scaling_type yarn")):
        with pytest.raises(EdgekvError, match=f"{name}: was saved with another RoPE scaling, {there}"):
            talk.load(tmp_path / name)
    talks[0].load(tmp_path / "plain")

    saved = SavedSession.read(tmp_path / "stretched")
    assert saved.rope == "scaling_type yarn, freq_scale 0.5"
    data = (tmp_path / "stretched").read_bytes()
    (tmp_path / "stretched").write_bytes(data.replace(b"freq_scale 0.5", b"freq_scale 0.6"))
    refuse(tmp_path / "stretched", "checksum")


def refuse(path, why):
    with pytest.raises(EdgekvError, match=why) as error:
        SavedSession.read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damaged_session_files(session_file, smollm2):
    data = session_file.read_bytes()
    for n in {*range(0, 700, 7), len(data) - 1, len(data) // 2}:
        session_file.write_bytes(data[:n])
        refuse(session_file, "damaged|is not a session")
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(data), 300), *range(8)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(0, 8))
        session_file.write_bytes(flipped)
        refuse(session_file, "damaged|is not a session|format version")
    session_file.write_bytes(data.replace(b'"version":"1"', b'"version":"2"'))
    refuse(session_file, "format version 2, this edgekv reads version 1")
    refuse(smollm2, "is not a session")
    refuse(session_file.parent / "none", "no such file")
    refuse(session_file.parent, "no such file")


@pytest.mark.parametrize("change", [
    dict(tokens=np.arange(50, dtype=np.int64)), dict(tokens=np.zeros((5, 10), np.int32)),
    dict(tokens=np.zeros(50, np.float32)), dict(tokens=np.array([1, -2], np.int32)),
    dict(state=np.zeros((30, 100), np.uint8)), dict(state=np.zeros(3000, np.int8)),
    dict(messages=5), dict(messages=[5]), dict(messages={}), dict(messages=[{"role": "user"}]),
    dict(messages=[{"role": "user", "content": 5}]), dict(messages=[{"role": 5, "content": "x"}]),
    dict(messages=[{"role": "tool", "content": "x"}]), dict(messages=[{"role": "user", "content": None}]),
], ids=str)
def test_forged_session_files(session_file, change):
    """The checksum matches, but what is in them is nothing that a conversation could go on with."""
    from safetensors.numpy import save

    saved = SavedSession(**{**SavedSession.read(session_file).__dict__, **change})
    messages = json.dumps(saved.messages)
    session_file.write_bytes(save({"tokens": saved.tokens, "state": saved.state}, {
        "format": "edgekv session", "version": "1", "model_sha256": saved.model_sha256, "messages": messages,
        "sha256": saved._digest(messages)}))
    refuse(session_file, "is damaged: its (tokens|state|messages)")


@pytest.mark.parametrize("messages", ["[" * 5000, '[{"role": "user", "content": "\\ud800"}]', "9" * 5000, "[", ""])
def test_forged_messages(session_file, messages):
    from safetensors.numpy import save

    saved = SavedSession.read(session_file)
    session_file.write_bytes(save({"tokens": saved.tokens, "state": saved.state}, {
        "format": "edgekv session", "version": "1", "model_sha256": saved.model_sha256, "messages": messages,
        "sha256": saved._digest(messages)}))
    refuse(session_file, "damaged")


def test_an_answer_without_a_question():
    """A loaded file may have it: nothing to take back, and the system prompt is no question."""
    talk = Conversation.__new__(Conversation)
    for before in ([], [{"role": "system", "content": "be brief"}]):
        talk.messages = [*before, {"role": "assistant", "content": "x"}]
        with pytest.raises(EdgekvError, match="no turn"):
            talk.undo()
        with pytest.raises(EdgekvError, match="no answer yet"):
            list(talk.regenerate())
        assert len(talk.messages) == len(before) + 1


def test_sessions_of_others(tmp_path, smollm2):
    """Refused with nothing changed: another model, another budget, a smaller context, a stock state."""
    from edgekv import native

    def talk(**change):
        options = {**dict(n_ctx=512, n_batch=64, n_ubatch=64, n_threads=2, kv_evict="knorm", kv_budget=96), **change}
        return Conversation(Llama(smollm2, **options), sampling=dict(temperature=0, max_tokens=4))

    first = talk()
    say(first, "word " * 300)
    first.save(tmp_path / "session")
    second = talk()
    say(second, "Hello")
    before = second.messages, second.llama.n_tokens, native.save_state(second.llama.ctx).tobytes()

    def refused(conversation, why):
        with pytest.raises(EdgekvError, match=why) as error:
            conversation.load(tmp_path / "session")
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)

    def rewritten(**change):
        saved = SavedSession.read(tmp_path / "session")
        SavedSession(**{**saved.__dict__, **change}).write(tmp_path / "session")

    good = (tmp_path / "session").read_bytes()
    rewritten(model_sha256="0" * 64)
    refused(second, "saved with another model")
    (tmp_path / "session").write_bytes(good)
    stock = talk(kv_evict="none", kv_budget=None)
    rewritten(state=native.save_state(stock.llama.ctx))
    refused(second, "stock, or damaged")
    (tmp_path / "session").write_bytes(good)
    refused(talk(kv_budget=128), "saved with budget 96, this context has 128")
    refused(talk(n_ctx=256), "tokens, the context 256")
    refused(talk(kv_evict="none", kv_budget=None), "of a context with eviction, this context has none")
    assert before == (second.messages, second.llama.n_tokens, native.save_state(second.llama.ctx).tobytes())
    second.load(tmp_path / "session")
    assert second.messages == first.messages and say(second, "And?") == say(first, "And?")


def test_turns(smollm2):
    """What messages hold after answers, stops, undo and errors."""
    llama = Llama(smollm2, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=2, kv_evict="streaming", kv_budget=128)
    conversation = Conversation(llama, system="Be brief.", sampling=dict(temperature=0, max_tokens=8))
    with pytest.raises(EdgekvError, match="no answer yet"):
        say(conversation)
    with pytest.raises(EdgekvError, match="no turn"):
        conversation.undo()
    answer = say(conversation, "Hello")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"] and answer
    pieces = conversation.ask("Go on")
    some = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": some}
    assert conversation.undo() == "Go on" and len(conversation.messages) == 3
    assert say(conversation) == answer

    before = list(conversation.messages)
    with pytest.raises(EdgekvError, match="exceed context window of 512"):
        say(conversation, "word " * 600)
    with pytest.raises(EdgekvError, match="exceed the context of 512"):
        conversation.read("word " * 600)
    llama.on_progress = lambda done, total: llama.interrupt()
    with pytest.raises(KeyboardInterrupt):
        say(conversation, "word " * 200)
    llama.on_progress = lambda done, total: None
    assert conversation.messages == before

    n = conversation.read("The lighthouse is green.")
    assert n > 3 and conversation.read("The sea is grey.") > 3
    say(conversation, "What colour?")
    assert conversation.messages[-2]["content"] == "The lighthouse is green.\n\nThe sea is grey.\n\nWhat colour?"
    assert llama.timings["prompt_n"] < 16
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_no_template(tmp_path):
    with pytest.raises(EdgekvError, match="has no chat template"):
        Conversation(Llama(write_tiny_model(tmp_path / "tiny.gguf"), n_threads=1))


# --- the command -----------------------------------------------------------------------------------------------------


def chat(model, lines, *arguments, timeout=300):
    return subprocess.run([*EDGEKV, "chat", str(model), "--temp", "0", "-c", "1024", "-ub", "64", "-b", "64", "-n", "6",
                           *map(str, arguments)], input="\n".join(lines), capture_output=True, text=True, timeout=timeout)


def test_chat_from_a_pipe(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse of Sandhamn is green. " * 60)
    r = chat(smollm2, ["/help", "Hello \\", "there", "/stats", f"/file {text}", "What colour?", "/regen", "/undo", "/set",
                       "/set temp 0.5", "/set temp hot", "/set size 3", "/nonsense", "/file", "/undo now",
                       f"/file {tmp_path / 'none'}", f"/save {tmp_path / 's'}", "/clear", "/undo", f"/load {tmp_path / 's'}",
                       f"/load {text}", "/exit", "never asked"],
             "--kv-evict", "knorm", "--kv-budget", 200)
    assert r.returncode == 0, r.stderr
    said = r.stderr
    for line in ("/regen", "evictions in", "tokens read", "taken back: The lighthouse", "temp                 0.0",
                 "error: /set temp: 'hot' is not a valid float", "error: /set size: choose one of", "error: /nonsense: unknown",
                 "error: /file needs PATH", "error: /undo takes no argument", "No such file", "saved", "begins anew",
                 "error: there is no turn", ": 1 turns, ", "is not a session"):
        assert line in said, (line, said)
    assert "Traceback" not in said and len(r.stdout.strip().splitlines()) >= 3
    assert sorted(os.listdir(tmp_path)) == ["s", "text.txt"]


@pytest.mark.parametrize(("why", "arguments"), [
    ("--grammar: the grammar is empty", ["--grammar", " "]),
    ("the grammar cannot be parsed: ", ["--grammar", "root ::= ((("]),
    ("the grammar cannot be parsed", ["--grammar", 'leaf ::= "a"']),
    ("--json-schema: is not JSON", ["-j", "{"]),
    ("--json-schema-file none: No such file", ["-jf", "none"]),
    ("both say what the answer looks like", ["-j", "{}", "--grammar", 'root ::= "a"']),
    ("-f none: No such file", ["-f", "none"]),
    ("none: no such file", ["--session", "none"]),
])
def test_chat_with_bad_input(smollm2, why, arguments):
    r = chat(smollm2, ["Hello"], *arguments)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode == 1 and last.startswith("edgekv: error: ") and why in last and "Traceback" not in r.stderr, r.stderr
    assert len([line for line in r.stderr.splitlines() if "fits the free memory" not in line]) == 1, r.stderr


def test_answers_that_follow_a_grammar(smollm2):
    r = chat(smollm2, ["Is the sea green?", "And grey?"], "--grammar", 'root ::= "yes" | "no"')
    assert set(r.stdout.split()) <= {"yes", "no"} and len(r.stdout.split()) == 2
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    r = chat(smollm2, ["A number, please"], "-j", schema, "-n", 30)
    assert isinstance(json.loads(r.stdout)["a"], int)


PROMPT = r"(^|\n)>"


class Screen:
    """A process on a pseudo-terminal: what it shows, without the escape sequences, and keys for it."""

    def __init__(self, command, env):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, env)
        self.text = ""

    def wait(self, pattern: str, timeout: float = 240) -> str:
        """Until the pattern has come since the last call; what came up to its end."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text[-2000:]!r}"
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    data = b""
                assert data, f"ended without {pattern!r}: {self.text!r}"
                self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r", "", data.decode(errors="replace"))
                self.text = re.sub("\x08", "", self.text)
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def keys(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ended(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_session(llama, smollm2, tmp_path):
    """A model without filters: loads a document, asks, stops an answer with Ctrl-C, regenerates, saves, leaves, loads."""
    text, saved = tmp_path / "text.txt", tmp_path / "saved"
    text.write_text("The lighthouse of Sandhamn was painted green in 1921.\n\n" + document(llama, 3000))
    cache = tmp_path / "cache"  # its own filters, its own history
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "EDGEKV_CACHE": str(cache), "COLUMNS": "120"}
    command = [*EDGEKV, "chat", str(smollm2), "--kv-budget", "512", "--temp", "0", "-n", "400"]

    screen = Screen(command, env)
    screen.wait("has no Q-Filters, calibrating them once")
    screen.wait(PROMPT)
    screen.keys(f"/file {text}\r")
    screen.wait(r"text\.txt: 3,\d\d\d tokens read")
    screen.wait(PROMPT)
    screen.keys("Write a very long story about the lighthouse.\r")
    screen.wait("lighthouse\\.\n")  # the echo
    screen.wait(r"\w+ \w+ \w+ \w+ ")
    screen.keys("\x03")
    screen.wait("stopped", 30)
    screen.wait(PROMPT)
    screen.keys("/set n_predict 24\r")
    screen.wait(PROMPT)
    screen.keys("/regen\r")
    screen.wait(r"(\w+ ){8}")
    screen.wait(PROMPT)
    screen.keys("/stats\r")
    seen = screen.wait(r"evictions in .* checkpoints")
    assert re.search(r"prompt 1 tokens in .*\((3,\d\d\d) more were in the cache\)", seen), seen
    screen.wait(PROMPT)
    screen.keys(f"/save {saved}\r")
    screen.wait("saved: saved")
    screen.wait(PROMPT)
    screen.keys("And then?\r")
    screen.wait(r"And then\?\n")
    after = screen.wait(r"\n(?=(edgekv: .*\n)?>)")
    screen.keys("\x04")
    assert screen.ended() == 0

    screen = Screen(command, env)
    screen.wait(PROMPT)
    screen.keys(f"/load {saved}\r")
    screen.wait(r"saved: 1 turns, 3,\d\d\d tokens")
    screen.wait(PROMPT)
    screen.keys("/set n_predict 24\r")
    screen.wait(PROMPT)
    screen.keys("And then?\r")
    screen.wait(r"And then\?\n")
    again = screen.wait(r"\n(?=(edgekv: .*\n)?>)")
    assert again.strip() == after.strip() != ""
    screen.keys("/exit\r")
    assert screen.ended() == 0
    assert (cache / "chat" / "history").exists() and len(list((cache / "filters").iterdir())) == 1
