"""What the documents say to type is tried: every command of README.md, docs/ and benchmarks/README.md runs with small
stand-ins for models and texts, or, where this machine cannot run it, its words are checked and UNTRIED says why. Python
blocks run too. docs/cli.md must be what the commands say.

A stand-in has the name that the documents use, so that commands run as they are written: MODEL.gguf is a tiny random
model that lies in the working folder. What would take long gets smaller numbers (SMALLER).
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import gguf
import numpy as np
import pytest
from click.testing import CliRunner

import edgekv
from edgekv import calibrate, cli, session
from edgekv.convert import convert, save_filters
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from edgekv.native import CacheStats
from edgekv.settings import EvictionSettings, RopeSettings, SelectionSettings
from hub_server import Hub
from process import EDGEKV, python
from test_filters import random_filters
from tinymodel import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
# docs/cli.md is written from the commands
DOCUMENTS = [ROOT / "README.md",
             *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "cli.md"),
             ROOT / "benchmarks/README.md"]
PROGRAM = r"(?:edgekv|(?:\.venv/bin/)?python3?|pip|pytest|tools/[\w.-]+)"
ASSIGNMENTS = r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+)\s+)*"
COMMAND = re.compile(rf"{ASSIGNMENTS}{PROGRAM}(?:\s|$)")

# Not run here; (command, why). Its words are checked all the same, see check_words().
_BUILD = "compiles llama.cpp"
_GPU = "wants a GPU"
_LARGE = "a large download"
_TORCH = "needs torch; tests/test_hf.py converts checkpoints"
_MEASURES = "measures for minutes or hours; its code has tests of its own"
_SCRIPTS = "tests/test_long.py runs it"
_8B = "a file without weights; tests/test_plan.py writes it and plans for it"
_PIN = "of another pin; tests/test_patches.py tries unpack, a broken patch, resume and refresh"
UNTRIED = {
    # tools of their own
    "tools/demo": "the newcomer's script runs it in a fresh clone",
    "tools/test": "is what runs this",
    "tools/test --slow": "is what runs this",
    "tools/test -m gemma -s": _LARGE,
    "tools/test --slow -k wire -s": "is what runs this",
    "pytest tests/test_hf.py -m slow -s": "is what runs this",
    "pytest tests/test_quality.py -m slow -s": "is what runs this",
    "tools/dev": _BUILD,
    "tools/dev -DEDGEKV_SERVER=OFF": _BUILD,
    "tools/dev -DGGML_CUDA=on": _BUILD,
    "tools/sanitize": _BUILD,
    "tools/op-tests": _BUILD,
    "tools/fuzz": _MEASURES,
    "tools/fuzz --seconds 165": _MEASURES,
    "tools/gpu-check": _GPU,
    "tools/gpu-check -o results": _GPU,
    ".venv/bin/python tools/same-text MODEL-qfilters.gguf -ngl 99": _GPU,
    ".venv/bin/python benchmarks/attention.py --device CUDA0": _GPU,
    ".venv/bin/python tools/cli_reference": "run by the tests of docs/cli.md below",
    "tools/wheel": _BUILD,
    'CMAKE_ARGS="-DGGML_CUDA=on" tools/wheel --local cu129': _BUILD,
    "tools/smoke dist/*.whl": "needs a wheel; tests/test_workflows.py runs the script",
    "tools/llama_source.py unpack --dest build/tree": "tests/test_patches.py does, elsewhere",
    "tools/llama_source.py refresh --tree build/tree": "tests/test_patches.py does, elsewhere",
    "tools/llama_source.py check": "tests/test_patches.py does",
    "python tests/header.py 8b.gguf": _8B,
    "edgekv plan 8b.gguf --ctx 131072 --gpu rtx4060": _8B,
    "edgekv run 8b.gguf -c 131072 -ngl -1 -ctk q4_0 -ctv q4_0 --kv-evict kvdiff+qfilters+recency --kv-budget 66816": _8B,
    "python tests/families.py --table": _TORCH,
    "python tests/unpatched.py": _BUILD,
    "python benchmarks/attention.py -o json": _MEASURES,
    "python benchmarks/recall.py smollm2-135m": _MEASURES,
    "python benchmarks/recall.py gemma3-270m --lengths 2048,4096,8192,16384,32768": _LARGE,
    "python benchmarks/budgets.py smollm2-135m": _TORCH,
    "python benchmarks/budgets.py smollm2-135m -c 1024 -n 20 -s 0 -t 1 --kv-budget x2,x4,x8 --policies "
    '"kvdiff,kvdiff+qfilters+recency,keydiff" --budgets '
    '"uniform,heads,heads and layers,heads by attention,calibrated,dense 2"': _TORCH,
    "python benchmarks/policies.py smollm2-135m": _MEASURES,
    'python benchmarks/long.py gemma3-270m --only "full cache; full cache, windows only; full cache, q8_0; full cache, quest; '
    'kvdiff+qfilters+recency 4,096; kvdiff 4,096; streaming 4,096; kvdiff+qfilters+recency 2,048" -o gemma3.json --plot '
    'gemma3.svg': _LARGE,
    "python benchmarks/long.py --record benchmarks/results/gemma3-270m-long-32000.json": _SCRIPTS,
    "python benchmarks/figure.py RECORD.json --trace FILE.csv -o FILE.svg": _SCRIPTS,
    "python benchmarks/figure.py record.json read.json --trace trace.csv read-trace.csv --title "
    '"SmolLM2-135M on two cores of an AMD EPYC" -o gain.svg': _SCRIPTS,
    "python benchmarks/policies.py smollm2-135m --loss popular.txt --kv-budget 512 -t 1 --ideas "
    '"kvdiff; kvdiff + qfilters; ..."': _MEASURES,
    "python benchmarks/serve.py smollm2-135m --server stock=PATH --server ours=PATH --flags "
    'ours="--kv-evict kvdiff --kv-budget 512"': _MEASURES,
    # installing
    "pip install .": _BUILD,
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install .': _BUILD,
    "CMAKE_ARGS=-DGGML_CUDA=on pip install .": _BUILD,
    "pip install '.[convert]'": _LARGE,
    "pip install '.[cuda]'": _GPU,
    "pip install nvidia-cublas-cu12 nvidia-cuda-runtime-cu12": _LARGE,
    "pip install fastapi uvicorn sse-starlette starlette-context pydantic-settings":
        "tests/test_llama_cpp_server.py needs them",
    # edgekv
    "edgekv serve MODEL --mmproj FILE": "needs a projector; tests/test_media.py and tests/test_serve_cli.py make one",
    "edgekv convert ORG/NAME --outtype q4_k_m --with-qfilters": _TORCH,
    # docs/developing.md, moving to another llama.cpp
    "pip download --no-deps --no-binary llama-cpp-python --dest build/next llama-cpp-python==VERSION": _LARGE,
    "tar xzf build/next/llama_cpp_python-VERSION.tar.gz -C build/next --strip-components 1": _PIN,
    "rm build/next/llama_cpp_python-VERSION.tar.gz": _PIN,
    "EDGEKV_LLAMA_SOURCE=build/next tools/llama_source.py unpack --dest build/next-tree": _PIN,
    "tools/llama_source.py unpack --dest build/next-tree": _PIN,
    "tools/llama_source.py unpack --dest build/next-tree --resume": _PIN,
    "tools/llama_source.py refresh --tree build/next-tree": _PIN,
    "git -C build/next-tree apply --reject ../../patches/NAME.patch": _PIN,
    "sed '/^---$/,$d' patches/NAME.patch > build/header": _PIN,
    "find build/next-tree -name '*.rej' -delete": _PIN,
    "git -C build/next-tree add --all": _PIN,
    "git -C build/next-tree commit -F ../header": _PIN,
    # other programs
    "ssh -L 50052:127.0.0.1:50052 OTHER": "there is no other machine",
}

# Python blocks that are only compiled: (document, a line of it) -> why
UNTRIED_BLOCKS = {
    ("serving.md", "client = OpenAI("): "tests/test_serve_openai.py uses this client",
    ("serving.md", "uvicorn.run("): "runs for ever; tests/test_llama_cpp_server.py has this class in that server",
}

# what a command gets besides, or instead: the same flags with numbers that take seconds
SMALLER = {
    "run": {"-n": "4", "-t": "1", "--grammar": "root ::= [a-z]+"},  # else four random bytes may be no text
    "chat": {"-n": "4", "-t": "1"},
    "bench": {"-r": "1", "-t": "1", "-d": "16,64", "-n": "2", "-p": "8", "--kv-budget": "32", "-ub": "16"},
    "convert": {"-t": "1"},
    "calibrate": {"-t": "1"},
    "eval niah": {"-n": "1", "-f": "prose.txt", "-c": "1536", "-t": "1", "--kv-budget": "x4", "--tasks": "key",
                  "--kv-evict": "none,kvdiff"},
    "eval ruler": {"-n": "1", "-f": "prose.txt", "-c": "1536", "-t": "1", "--kv-budget": "x4", "--tasks": "vt",
                   "--kv-evict": "none,kvdiff"},
    "eval ppl": {"--length": "256", "-t": "1", "--kv-budget": "128"},
    "eval kl": {"--length": "256", "-t": "1", "--kv-budget": "128"},
    "eval attention": {"--length": "256", "-t": "1"},
    "inspect": {"--length": "256", "--steps": "8"},
}


# --- reading the documents -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One command, without its comment and what is behind ``&``.

    ``mention``: it stands in a sentence, and is no more than the name of a program and a subcommand.
    """

    text: str
    document: str
    mention: bool


FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)


def blocks(text: str, language: str) -> list[str]:
    return [re.sub(rf"^{fence[1]}", "", fence[3], flags=re.M) for fence in FENCE.finditer(text) if fence[2] == language]


def lines_of(block: str) -> list[str]:
    """The commands of a block of shell, those that a line joins apart."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = shlex.shlex(line, punctuation_chars="&;|", posix=False)
        words.whitespace_split, words.commenters = True, "#"
        part: list[str] = []
        for word in [*words, "&"]:
            if set(word) <= set("&;|"):
                found.append(" ".join(part))
                part = []
            else:
                part.append(word)
    return [command for command in found if command]


def commands_in(name: str, text: str) -> list[Command]:
    found = [Command(line, name, False) for language in ("sh", "bash", "console") for block in blocks(text, language)
             for line in lines_of(block)]
    rest = FENCE.sub("", text)
    indented = re.compile(r"(?:^    .*\n?)+", re.M)
    for block in indented.findall(rest):
        if COMMAND.match(block.strip()) or re.match(r"cat ", block.strip()):
            found += [Command(line, name, False) for line in lines_of(re.sub(r"^    ", "", block, flags=re.M))]
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", indented.sub("", rest)):
        code = " ".join(code.split())
        if COMMAND.match(code):
            found.append(Command(code, name, re.fullmatch(r"edgekv( [a-z][a-z-]*)*|tools/[\w.-]+", code) is not None))
    return found


COMMANDS = [command for path in DOCUMENTS for command in commands_in(path.name, path.read_text(encoding="utf-8"))]


def kind_of(command: Command) -> str:
    if command.mention:
        return "mentioned"
    if command.text in UNTRIED:
        return "untried"
    program = command.text.split()[0]
    if program == "edgekv":
        words = command.text.split()
        if words[1] in ("serve", "rpc-server") and "--help" not in words:
            return "served"
        return "remote" if "--rpc" in words else "run"
    return {"curl": "served", "cat": "read"}.get(program, "unknown")


def of_kind(kind: str) -> list[str]:
    return list(dict.fromkeys(command.text for command in COMMANDS if kind_of(command) == kind))


def test_every_command_is_tried_or_listed():
    unknown = [f"{command.document}: {command.text}" for command in COMMANDS if kind_of(command) == "unknown"]
    assert not unknown, f"neither run nor in UNTRIED of {__file__} with a reason: {unknown}"
    unused = set(UNTRIED) - set(of_kind("untried")) - {command.text for command in COMMANDS}
    assert not unused, f"in UNTRIED of {__file__}, but in no document: {sorted(unused)}"


def test_reading_a_document(tmp_path):
    text = ("Say `edgekv run` or `edgekv\nrun M -p x`, not `edgekv:NAME`.\n\n"
            "```sh\nedgekv pull A   # b & c\npip install . && x \"a & b\"\n"
            "edgekv rpc-server -p 1 & edgekv run B \\\n  -p \"#1\"\n```\n\n    edgekv doctor   # d\n\n"
            "    edgekv: a line that is printed\n\n1. x\n\n   ```sh\n   tools/dev\n   ```\n")
    found = commands_in("x.md", text)
    assert [c.text for c in found] == [
        "edgekv pull A", "pip install .", 'x "a & b"', "edgekv rpc-server -p 1", 'edgekv run B -p "#1"', "tools/dev",
        "edgekv doctor", "edgekv run", "edgekv run M -p x"]
    assert [c.text for c in found if c.mention] == ["edgekv run"]


# --- what cannot run here: its words ---------------------------------------------------------------------------------


def click_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the words behind its name."""
    command: click.Command = cli.main
    while isinstance(command, click.Group) and words:
        command, name = command.get_command(click.Context(command), words[0]), words[0]
        assert command is not None, f"edgekv has no command {name}"
        words = words[1:]
    return command, words


def check_words(text: str) -> None:
    """Whether a command's program and flags are there. AssertionError, or click's, says what is not."""
    words = [word for word in shlex.split(text) if not re.match(r"[A-Z_]+=", word)]
    program, words = words[0], words[1:]
    if program == "edgekv":
        command, words = click_command(words)
        if words or not isinstance(command, click.Group):
            command.make_context("x", words)
        return
    if program.endswith("python"):
        program, words = words[0], words[1:]
    elif program == "pytest":
        assert (ROOT / words[0]).is_file(), words[0]
        words = words[1:]
    elif program == "pip":
        for word in words:
            if extra := re.fullmatch(r"\.\[(\w+)\]", word):
                assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
        return
    elif "/" not in program:
        return
    script = ROOT / program
    if program != "pytest":
        runs = script.is_file() and (script.suffix == ".py" or os.access(script, os.X_OK))
        assert runs, f"{program} is not there, or cannot be run"
    written = script.read_text() if program != "pytest" else ""
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.M)
    for i, word in enumerate(words):
        if program in ("tools/test", "pytest") and word in ("-m", "-s", "-k"):
            if word == "-m":
                assert words[i + 1] in markers, f"{text}: no such marker"
            if word == "-k":
                tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
                assert re.search(rf"^def test_\w*{words[i + 1]}", tests, re.M), f"{text}: no such test"
        elif word.startswith("-DEDGEKV_"):
            assert word[2:].split("=")[0] in (ROOT / "CMakeLists.txt").read_text()
        elif word.startswith("-") and not word.startswith("-DGGML_"):
            flag = re.escape(word.split("=")[0])
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", written), f"{program} has no {word}"


@pytest.mark.parametrize("text", [*of_kind("untried"), *of_kind("mentioned")])
def test_untried_and_mentioned_commands_are_there(text):
    check_words(text)


@pytest.mark.parametrize("text", [
    "edgekv runn", "edgekv eval niahh", "tools/demoo", "tools/test -m slwo", "tools/gpu-check --fast",
    "python benchmarks/serve.py --slot 1", "pip install '.[torch]'", "tools/dev -DEDGEKV_SERVR=OFF",
    "edgekv bench M --kv-evicted none", "tools/test -k nothing_of_this_name"])
def test_words_that_are_not_there_are_found(text):
    with pytest.raises((AssertionError, click.UsageError)):
        check_words(text)


# --- what runs -------------------------------------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


def tiny(path: Path) -> Path:
    """A tiny model with a chat template."""
    def add(writer, start=gguf.GGUFWriter.write_header_to_file, **arguments):
        writer.add_chat_template(TEMPLATE)
        start(writer, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", add)
        return write_tiny_model(path, n_layer=3, n_ctx=2048)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with what the documents talk about, and a cache folder of its own."""
    folder = tmp_path_factory.mktemp("docs")
    plain = tiny(folder / "MODEL.gguf")
    filters = random_filters(GGUF(plain), text_sha256=[])
    for name in ("MODEL-qfilters.gguf", "smollm2-135m", "smollm2-qf.gguf", "gemma-3-270m-q4_k_m.gguf", "A", "B"):
        convert(plain, folder / name, filters)
    shutil.copy(plain, folder / "MODEL")
    # where filters that a file lacks are kept; a calibration takes long here, as this text is cut into bytes
    kept = folder / "cache/filters"
    kept.mkdir(parents=True)
    save_filters(kept / f"{filters.model_sha256}.gguf", GGUF(plain), filters)
    prose = calibrate.default_text()[20000:32000]
    (folder / "prose.txt").write_text(prose)
    for name in ("book.txt", "TEXT", "docs.txt", "popular.txt"):
        (folder / name).write_text(prose[:600])
    shutil.copy(ROOT / "benchmarks/results/smollm2-135m-epyc-2-cores.json", folder / "bench.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EDGEKV_CACHE", str(folder / "cache"))
        patch.setattr(calibrate, "default_text", lambda: prose)
        patch.setattr(calibrate, "SEQUENCE_TOKENS", 128)
        patch.setattr(calibrate, "MIN_QUERIES", 100)
        # threads wait for each other by spinning, which on a busy machine takes long
        patch.setattr(session, "default_threads", lambda: 1)
        yield folder


def smaller(words: list[str]) -> list[str]:
    """The words behind ``edgekv``, with numbers that take seconds."""
    name = next((name for name in SMALLER if words[:len(name.split())] == name.split()), None)
    command, _ = click_command(words)
    known = {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
    changed = list(words)
    for flag, value in SMALLER.get(name, {}).items():
        assert flag in known, f"SMALLER of {name} has {flag}, which is no option of it"
        if flag in changed:
            changed[changed.index(flag) + 1] = value
        elif flag in ("--kv-evict", "--kv-budget", "--tasks"):
            continue  # only instead of what is there
        elif name == "inspect" and not {"--attention", "--quality"} & set(words):
            continue
        else:
            changed += [flag, value]
    if name == "eval niah" and "--kv-select" in changed:
        changed[changed.index("--kv-select-budget") + 1] = "256"
        changed[changed.index("--kv-evict") + 1] = "none"
    if name == "eval niah" and "--against" in changed:
        changed[changed.index("--against") + 1] = "kvdiff"
    return changed


def run_here(text: str, stdin: str = "") -> str:
    """Its standard output. AssertionError if it fails; with ``> FILE`` behind it that goes to the file."""
    text, _, target = text.partition(" > ")
    result = CliRunner().invoke(cli.main, smaller(shlex.split(text)[1:]), input=stdin)
    assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception!r}"
    if target:
        Path("written-" + target).write_text(result.stdout)
    return result.stdout


LOCAL = [text for text in of_kind("run") if not text.startswith(("edgekv pull", "edgekv chat"))]
# variants of others, each some seconds even so: the normal run looks at their words only
LONG = [text for text in LOCAL if "-s 50" in text or "--bandwidth" in text or "--log" in text]


@pytest.mark.parametrize("text", LONG)
def test_long_commands_are_there(text):
    check_words(text.partition(" > ")[0])


@pytest.mark.parametrize("text", [pytest.param(text, marks=pytest.mark.slow if text in LONG else ()) for text in LOCAL])
def test_commands_run(text, place):
    assert run_here(text).strip()


@pytest.mark.parametrize("text", [text for text in of_kind("run") if text.startswith("edgekv chat")])
def test_chats_run(text, place):
    lines = ["/file book.txt", "Who is the narrator?", "/regen", "/stats", "/undo", "/save talk", "/load talk",
             "/set temp 0", "/clear", "/help", "/exit"]
    assert run_here(text, stdin="\n".join(lines) + "\n").strip()


@pytest.mark.parametrize("text", of_kind("read"))
def test_files_that_commands_read_are_there(text):
    for word in text.partition(" > ")[0].split()[1:]:
        assert (ROOT / word).is_file(), word


def test_pull(place, tmp_path):
    """From a hub of our own, in a process of its own: huggingface_hub reads its settings when it is imported."""
    pulls = [text for text in of_kind("run") if text.startswith("edgekv pull")]
    assert pulls
    (tmp_path / "hub/ORG/REPO").mkdir(parents=True)
    shutil.copy(place / "MODEL.gguf", tmp_path / "hub/ORG/REPO/model-Q4_K_M.gguf")
    with Hub(tmp_path / "hub") as hub:
        for text in pulls:
            words = [{"smollm2-135m": "hf:ORG/REPO:Q4_K_M"}.get(word, word) for word in text.split()[1:]]
            done = subprocess.run([*EDGEKV, *words], capture_output=True, text=True, timeout=120,
                                  env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")})
            assert done.returncode == 0, done.stderr
            if "--help" not in words:
                assert GGUF(done.stdout.splitlines()[-1]).n_layer == 3


class Running:
    """A command that runs until it is interrupted. ``found``: what ``ready`` matches in what it says."""

    def __init__(self, words: list[str], ready: str):
        self.process = subprocess.Popen([*EDGEKV, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = ""
        while not (found := re.search(ready, said)):
            line = self.process.stderr.readline()
            assert line, said
            said += line
        self.found = found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        _, rest = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, rest


SERVES = [text for text in of_kind("served") if text.startswith("edgekv serve")]


@pytest.mark.parametrize("text", SERVES)
def test_servers_run_and_answer(text, place):
    from served import SERVER

    if not SERVER.exists():
        pytest.skip(f"{SERVER} has not been built")
    words = shlex.split(text)[1:]
    if "--port" in words:
        words[words.index("--port") + 1] = "0"
    else:
        words += ["--port", "0"]
    key = words[words.index("--api-key") + 1] if "--api-key" in words else "none"
    requests = [shlex.split(curl) for curl in of_kind("served") if curl.startswith("curl")]
    assert requests
    with Running([*words, "-t", "1"], r" is served at (http://\S+) ") as server:
        for curl in requests:
            url = re.sub(r"http://127\.0\.0\.1:\d+", server.found[1], curl[1])
            body = {**json.loads(curl[curl.index("-d") + 1]), "max_tokens": 4}
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Authorization": f"Bearer {key}"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"]


def test_servers_for_other_machines(place):
    """docs/rpc.md and docs/devices.md: `edgekv rpc-server` as they start it, at free ports, and all that uses --rpc."""
    starts = [shlex.split(text)[1:] for text in of_kind("served") if text.startswith("edgekv rpc-server")]
    assert len(starts) == 2
    ready = r" at (\S+:\d+); Ctrl-C"
    starts = [[re.sub(r"^5005\d$", "0", word) for word in words] + ["-t", "1"] for words in starts]
    with Running(starts[0], ready) as one, Running(starts[1], ready) as two:
        servers = [one.found[1], two.found[1]]
        for text in of_kind("remote"):
            words = smaller(shlex.split(text)[1:])
            where = words.index("--rpc") + 1
            words[where] = ",".join(servers[:words[where].count(",") + 1])
            done = subprocess.run([*EDGEKV, *words], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_the_readme_on_a_real_model(tmp_path, monkeypatch, smollm2):
    """Its commands as they are, but for the lengths of answers, on SmolLM2; the answers must be words."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL.gguf", "smollm2-135m"):
        (tmp_path / name).symlink_to(smollm2)
    (tmp_path / "book.txt").write_text(calibrate.default_text()[:9000])
    short = {"-n": "16", "-t": "1"}
    monkeypatch.setattr(sys.modules[__name__], "SMALLER", {"run": short, "chat": short, "convert": {"-t": "1"}})
    text = (ROOT / "README.md").read_text()
    tried = [line for block in blocks(text, "sh") for line in lines_of(block)
             if re.match(r"edgekv (convert MODEL|run|chat|inspect)", line) and "--rpc" not in line]
    assert len(tried) >= 5
    # the file that one writes is the one that others read
    for line in sorted(tried, key=lambda line: not line.startswith("edgekv convert")):
        told = run_here(line, stdin="/file book.txt\nWho is the narrator?\n/exit\n" if "chat" in line else "")
        assert re.search(r"[a-z]{3}", told), line
    assert (tmp_path / "MODEL-qfilters.gguf").exists()


# --- Python ----------------------------------------------------------------------------------------------------------

PYTHON = {path.name + "/" + path.parent.name: blocks(path.read_text(encoding="utf-8"), "python") for path in DOCUMENTS}


@pytest.mark.parametrize("name", [name for name, found in PYTHON.items() if found])
def test_python_blocks(name, place, monkeypatch, capsys):
    """The blocks of a document one after the other, on one thread; answers are short."""
    start = edgekv.Llama.__init__
    monkeypatch.setattr(edgekv.Llama, "__init__", lambda self, *args, **kwargs: start(self, *args, **{
        "n_threads": 1, "n_threads_batch": 1, **kwargs}))
    for call in ("create_chat_completion", "create_completion"):
        whole = getattr(edgekv.Llama, call)
        monkeypatch.setattr(edgekv.Llama, call, lambda self, *args, _whole=whole, **kwargs: _whole(
            self, *args, **{"max_tokens": 4, **kwargs}))
    names: dict = {"__name__": "block"}
    listed = {line for document, line in UNTRIED_BLOCKS if document == name.split("/")[0]}
    for block in PYTHON[name]:
        code = compile(block, name, "exec")
        here = {line for line in listed if line in block}
        listed -= here
        if not here:
            exec(code, names)
    assert not listed, f"in UNTRIED_BLOCKS, but not in {name}: {listed}"


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, without code marks; the table's head left out."""
    table = re.search(r"^\|(?:.*\n\|)*.*", text[text.index(heading):], re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in table]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_python_md_has_the_arguments_and_fields():
    text = (ROOT / "docs/python.md").read_text()

    def arguments(heading: str) -> dict[str, str]:
        return {name: default for row in rows_of(text, heading)
                for name, default in zip(code_in(row[0]), code_in(row[1]) or [""] * 9, strict=False)}

    def signature(function, without=("self", "kwargs")) -> dict[str, str]:
        return {name: "" if p.default is p.empty else repr(p.default).replace("'", '"')
                for name, p in inspect.signature(function).parameters.items() if name not in without}

    assert arguments("\n## edgekv.Llama\n") == signature(edgekv.Llama.__init__, ("self", "kwargs", "model_path"))
    assert arguments("`edgekv.session.Session` is") == signature(session.Session.__init__)
    fields = [name for row in rows_of(text, "## Statistics") for name in code_in(row[0])]
    assert sorted(fields) == sorted(CacheStats.__dataclass_fields__)
    methods = text[text.index("| method | meaning |"):text.index("| attribute | meaning |")]
    for row in rows_of(methods, "| method"):
        for call in code_in(row[0]):
            call = ast.parse(call).body[0].value
            taken = inspect.signature(getattr(edgekv.Llama, call.func.id)).parameters
            given = [*(word.id for word in call.args), *(word.arg for word in call.keywords)]
            assert set(given) <= set(taken), call.func.id
    settings = {cls.__name__: cls for cls in (EvictionSettings, SelectionSettings, RopeSettings)}
    for name, cell in rows_of(text, "## Settings"):
        written = {field.split("=")[0]: field.split("=")[1] for field in code_in(cell)}
        fields = settings[code_in(name)[0]].__dataclass_fields__.values()
        assert written == {field.name: repr(field.default).replace("'", '"') for field in fields}


# --- docs/metadata.md ------------------------------------------------------------------------------------------------


def test_metadata_md_shows_the_bytes(tmp_path):
    text = (ROOT / "docs/metadata.md").read_text()
    data = b""
    for offset, digits in re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)(?:  .*)?$", text, re.M):
        assert int(offset, 16) == len(data), offset
        data += bytes.fromhex(digits)
    filters = QFilters([np.array([[0.6, -0.8]])], [0], method="example", n_tokens=6144, n_queries=6144,
                       model_sha256="cd" * 32, report={"energy": [0.75]})
    save_filters(tmp_path / "ours.gguf", SimpleNamespace(architecture="llama"), filters)
    assert data == (tmp_path / "ours.gguf").read_bytes()

    (tmp_path / "shown.gguf").write_bytes(data)
    fields = gguf.GGUFReader(tmp_path / "shown.gguf").fields
    found = {key.removeprefix("edgekv.qfilters."): field for key, field in fields.items() if key.startswith("edgekv.")}
    assert found["vectors"].contents() == [np.float32(0.6), np.float32(-0.8)]
    assert found["sign"].contents() == "keep-high"
    # every key is described, with its type, and nothing else is
    described = {key: row[1] for row in rows_of(text, "## The pairs") for key in code_in(row[0])}
    names = {gguf.GGUFValueType.UINT32: "u32", gguf.GGUFValueType.UINT64: "u64", gguf.GGUFValueType.STRING: "string",
             gguf.GGUFValueType.INT32: "i32", gguf.GGUFValueType.FLOAT32: "f32", gguf.GGUFValueType.ARRAY: "array of"}
    for key, field in found.items():
        assert described[key] == " ".join(names[kind] for kind in field.types), key
    everything = random_filters(GGUF(write_tiny_model(tmp_path / "tiny.gguf")))
    assert set(described) == {key.removeprefix("edgekv.qfilters.") for key, *_ in everything.metadata()}


# --- docs/cli.md, links ----------------------------------------------------------------------------------------------


def reference(**environment: str) -> str:
    """What tools/cli_reference writes, in a process of its own: --help-all changes the commands of this one."""
    tool = str(ROOT / "tools/cli_reference")
    code = f"import runpy, sys; sys.argv[:] = [{tool!r}, '-']; runpy.run_path({tool!r}, run_name='__main__')"
    done = subprocess.run(python(code), capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cli_md_is_what_the_commands_say():
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert written == reference(), "docs/cli.md is stale; renew it with: .venv/bin/python tools/cli_reference"


def test_cli_md_does_not_depend_on_the_machine():
    elsewhere = reference(COLUMNS="40", HOME="/nowhere", LC_ALL="C", EDGEKV_CACHE="/nowhere", LLAMA_ARG_PORT="1")
    assert elsewhere == reference(COLUMNS="200")


def test_cli_md_has_every_option():
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n((?:.*\n)*?)(?=^## |\Z)", written, re.M))

    def compare(command: click.Command, name: str) -> None:
        written = re.findall(r"^\| (`-.*?) \|", sections[name], re.M)
        flags = [flag for row in written for flag in re.findall(r"`(-[^`]*)`", row)]
        options = [param for param in command.params if isinstance(param, click.Option)]
        there = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        assert len(flags) == len(set(flags)) and set(flags) == there, name
        for sub in command.list_commands(click.Context(command)) if isinstance(command, click.Group) else ():
            compare(command.get_command(click.Context(command), sub), f"{name} {sub}")

    compare(cli.main, "edgekv")


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "docs/cli.md"], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path):
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path if not file else path.parent / file
        assert there.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{path.name}: {target}"
