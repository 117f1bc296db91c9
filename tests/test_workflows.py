""".github/workflows and the scripts that they run, as far as they can be tried on one machine."""

import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
OPERATORS = 8


def load_yaml(text: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text)


def script(name: str):
    """A Python script without the ending .py, as a module."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(TOOLS / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


# --- the linters ------------------------------------------------------------------------------------------------------


def schema_errors(*paths: Path) -> str:
    """What GitHub's schema of workflows, which the package carries, says; '' if nothing."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def audit_errors(*paths: Path) -> str:
    """What zizmor finds, without a network: injections, unpinned actions, permissions, credentials; '' if nothing."""
    program = Path(sysconfig.get_path("scripts"), "zizmor")
    flags = ["--offline", "--no-progress", "--quiet", "--min-severity", "medium", "--strict-collection"]
    command = [program, *flags, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def reference_errors(workflow: dict) -> list[str]:
    """Names in a workflow that stand for nothing: jobs in needs, keys of the matrix, steps, jobs in expressions."""
    errors, jobs = [], workflow["jobs"]
    for name, job in jobs.items():
        needs = job.get("needs", [])
        needs = [needs] if isinstance(needs, str) else needs
        errors += [f"{name}: needs {other}, which is no job" for other in needs if other not in jobs]
        matrix = job.get("strategy", {}).get("matrix", {})
        keys = set(matrix) - {"include", "exclude"} | {key for row in matrix.get("include", []) for key in row}
        steps = {step["id"] for step in job.get("steps", []) if "id" in step}
        known = {"matrix": keys, "steps": steps, "needs": set(needs)}
        for expression in re.findall(r"\$\{\{(.*?)\}\}", json.dumps(job)):
            for context, key in re.findall(r"\b(matrix|steps|needs)\.([\w-]+)", expression):
                if key not in known[context]:
                    errors.append(f"{name}: {context}.{key} is not defined")
    return errors


def script_errors(workflow: dict) -> list[str]:
    """Shell that does not parse, and scripts that are not there."""
    errors = []
    for name, job in workflow["jobs"].items():
        for step in job.get("steps", []):
            if "run" not in step:
                continue
            parsed = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True)
            if parsed.returncode:
                errors.append(f"{name}: {parsed.stderr.strip()}")
            for used in re.findall(r"(?<![\w/])(?:tools|benchmarks|examples)/[\w./-]+", step["run"]):
                if not os.access(ROOT / used, os.X_OK):
                    errors.append(f"{name}: {used} is not there, or cannot be executed")
    return errors


def test_workflows_fit_the_schema():
    assert {path.name for path in WORKFLOWS} == {"build.yml", "release.yml"}
    assert not schema_errors(*WORKFLOWS)


def test_workflows_pass_the_audit():
    assert not audit_errors(*WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_what_is_there(path):
    workflow = load_yaml(path.read_text())
    assert not reference_errors(workflow)
    assert not script_errors(workflow)
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 360, name  # a call has the limits of what it calls
        assert job.get("strategy", {"fail-fast": False})["fail-fast"] is False, name
        for step in job.get("steps", []):
            assert "uses" not in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), f"{name}: {step['uses']}"


UPLOAD = "b7c566a772e6b6bfb58ed0dc250532a479d7789f"
PLANTED = {
    "a key that does not exist": ("schema", "    timeout-minutes: 10\n", "    timeout-minute: 10\n"),
    "a job without a machine": ("schema", "    name: Lint the workflows\n    runs-on: ubuntu-24.04\n", ""),
    "an action by its tag": ("audit", f"actions/upload-artifact@{UPLOAD}", "someone/upload@v6"),
    "text of others in a shell": ("audit", "run: tools/test\n", "run: echo ${{ github.event.pull_request.title }}\n"),
    "a job that is not there": ("references", "    needs: linux-cuda\n", "    needs: linux-gpu\n"),
    "a key that no matrix has": ("references", "${{ matrix.python }}", "${{ matrix.pyton }}"),
    "shell that does not parse": ("scripts", "run: tools/test\n", "run: 'if tools/test; then'\n"),
    "a script that is not there": ("scripts", "tools/op-tests --device", "tools/optests --device"),
}


@pytest.mark.parametrize("linter, old, new", PLANTED.values(), ids=PLANTED)
def test_planted_errors_are_caught(tmp_path, linter, old, new):
    text = (ROOT / ".github/workflows/build.yml").read_text()
    assert old in text
    # zizmor takes a file for a workflow by where it lies
    path = tmp_path / ".github/workflows/build.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(old, new))
    if linter in ("schema", "audit"):
        assert {"schema": schema_errors, "audit": audit_errors}[linter](path)
    else:
        assert {"references": reference_errors, "scripts": script_errors}[linter](load_yaml(path.read_text()))


# --- what the workflows promise ---------------------------------------------------------------------------------------


def test_every_wheel_is_uploaded_and_released():
    build = load_yaml((ROOT / ".github/workflows/build.yml").read_text())
    artifacts = []
    for name, job in build["jobs"].items():
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        uploads = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")]
        if "tools/wheel" in commands:
            assert len(uploads) == 1 and uploads[0]["if-no-files-found"] == "error", name
            artifacts.append(uploads[0]["name"])
    assert sorted(artifacts) == ["sdist", "wheel-linux-${{ matrix.arch }}", "wheel-linux-cuda", "wheel-macos-metal"]

    release = load_yaml((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert release["build"]["uses"] == "./.github/workflows/build.yml"
    order = ["version", "build", "gather", "pypi", "github"]
    assert [release[job].get("needs") for job in order] == [None, *order[:-1]]


def test_only_publishing_may_write():
    for path in WORKFLOWS:
        workflow = load_yaml(path.read_text())
        for name, job in {"": workflow, **workflow["jobs"]}.items():
            allowed = {"pypi": {"id-token"}, "github": {"contents"}}.get(name, set())
            assert {key for key, value in job.get("permissions", {}).items() if value == "write"} == allowed, name


# --- the scripts ------------------------------------------------------------------------------------------------------


def test_shell_scripts_parse():
    shell = [path for path in TOOLS.iterdir() if path.is_file() and b"bash" in path.read_bytes().splitlines()[0]]
    assert {"wheel", "smoke", "gpu-check"} <= {path.name for path in shell}
    for path in shell:
        assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("arguments, message", [
    (["tools/wheel", "-o"], "wheel: -o: needs a value"),
    (["tools/wheel", "nowhere"], "wheel: nowhere: no such source"),
    (["tools/gpu-check", "fly"], "gpu-check: fly: unknown"),
    (["tools/gpu-check", "--model", "nowhere.gguf"], "gpu-check: --model nowhere.gguf: no such file"),
    (["tools/op-tests", "--tree", "nowhere"], "op-tests: --tree nowhere: has no tests/test-backend-ops.cpp"),
    (["tools/check-release", "v0"], "check-release: pyproject.toml says"),
    (["tools/same-text", "nowhere.gguf"], "same-text: whole cache on the CPU: nowhere.gguf: no such file"),
])
def test_wrong_arguments_are_one_line(arguments, message):
    command = [sys.executable, *arguments] if arguments[0] in ("tools/op-tests", "tools/same-text") else arguments
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_op_tests_finds_every_operator(tmp_path):
    """Those that the patches give ggml are those with a constructor in our header."""
    header = (ROOT / "ggml_ops/include/ggml-edgekv.h").read_text()
    ours = {name.upper() for name in re.findall(r"^GGML_API struct ggml_tensor \* ggml_(edgekv_\w+)\(", header, re.M)}
    assert len(ours) == OPERATORS
    include = tmp_path / "ggml/include"
    include.mkdir(parents=True)
    added = []
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        part = patch.read_text().partition("+++ b/ggml/include/ggml.h\n")[2].partition("\ndiff --git")[0]
        added += [line[1:] for line in part.splitlines() if line.startswith("+")]
    (include / "ggml.h").write_text("\n".join(added))
    assert set(script("op-tests").operators(tmp_path)) == ours


CASES = """\
Testing 3 devices

Backend 1/3: CUDA0
  Device description: a GPU
  Device memory: 24105 MB (24105 MB free)

  EDGEKV_SCORE(type=f16,ne=[1,1,8,1]): OK
  EDGEKV_SCORE(type=q4_0,ne=[1,1,8,1]): not supported [CUDA0]
  EDGEKV_ATTN(type=f16,n=[7,3]): {attn}
  2/2 tests passed
  Backend CUDA0: OK
Backend 2/3: RPC0
  Skipping
Backend 3/3: CPU
  Skipping CPU backend
3/3 backends passed
"""
NAMES = ["EDGEKV_SCORE", "EDGEKV_ATTN"]
FAILED = "CUDA0: EDGEKV_ATTN: 1 case(s) failed, the first: type=f16,n=[7,3]"


@pytest.mark.parametrize("attn, wrong", [
    ("OK", None),
    ("[EDGEKV_ATTN] ERR = 0.100000000 > 0.000000100 FAIL", FAILED),
    ("sentinel mismatch: sent_1 FAIL", FAILED),
    ("not supported [CUDA0]", "CUDA0: EDGEKV_ATTN: none of its 1 cases is supported"),
])
def test_op_tests_counts_cases(attn, wrong):
    tool = script("op-tests")
    counts = tool.tally(CASES.format(attn=attn).splitlines(), NAMES)
    assert list(counts) == ["CUDA0"]
    assert counts["CUDA0"]["EDGEKV_SCORE"] == {"ok": 1, "unsupported": 1, "failed": []}
    assert tool.problems(counts) == ([wrong] if wrong else [])


def test_op_tests_are_not_passed_by_nothing():
    tool = script("op-tests")
    assert "no device" in tool.problems(tool.tally(["Backend 1/1: CPU", "  Skipping CPU backend"], NAMES))[0]
    no_cases = tool.tally(["Backend 1/1: MTL0", "  0/0 tests passed", "  Backend MTL0: OK"], NAMES)
    assert tool.problems(no_cases) == ["MTL0: EDGEKV_SCORE: has no case", "MTL0: EDGEKV_ATTN: has no case"]
    died = tool.tally(["Backend 1/1: MTL0", "  EDGEKV_SCORE(type=f16): OK", "  EDGEKV_ATTN(type=f16): "], NAMES)
    assert tool.problems(died) == ["MTL0: EDGEKV_ATTN: has no case"]


def test_same_text_forgives_ties_only():
    """Two steps, three tokens in the vocabulary: the second step's logits decide."""
    tool = script("same-text")

    def answered(tokens, second):
        return {"tokens": np.array(tokens), "logits": np.array([[3.0, 1, 0], second])}

    cpu = answered([0, 0], [2.0, 1.9, 0])
    assert tool.compare(cpu, answered([0, 0], [2.01, 1.9, 0]), 0.25)["agrees"]
    tie = tool.compare(cpu, answered([0, 1], [1.9, 2.0, 0]), 0.25)
    assert tie["agrees"] and tie["same"] == 1 and tie["gap"] == pytest.approx(0.1)
    far = tool.compare(cpu, answered([0, 2], [1.9, 1.8, 2.0]), 0.25)
    assert not far["agrees"] and far["gap"] == pytest.approx(2.0) and far["largest_difference"] == pytest.approx(2.0)
    assert not tool.compare(cpu, answered([0, 0], [np.nan, 1, 0]), 0.25)["agrees"]


def test_check_release(tmp_path):
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    names = [f"edgekv-{version}{rest}" for rest in (
        ".tar.gz", "-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", "-py3-none-manylinux_2_28_aarch64.whl",
        "-py3-none-macosx_14_0_arm64.whl", "+cu129-py3-none-manylinux_2_35_x86_64.whl")]
    for name in names:
        (tmp_path / name).write_text(name)

    def check(*arguments):
        done = subprocess.run([sys.executable, TOOLS / "check-release", *arguments], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    assert check(f"v{version}")[0] == 0
    assert check("v99.0.0", tmp_path)[0] == 1
    assert check(f"v{version}", tmp_path) == (0, "")
    sums = (tmp_path / "SHA256SUMS").read_text()
    assert all(name in sums for name in names) and sums.count("\n") == len(names)
    (tmp_path / names[3]).rename(tmp_path / "edgekv-98.0.0-py3-none-macosx_14_0_arm64.whl")
    assert "0 files are a wheel for macOS" in check(f"v{version}", tmp_path)[1]


def test_attention_benchmark_runs_on_a_named_device():
    """On the CPU, as small as it gets: it compares scores, choice and attention with float64 before it measures."""
    command = [sys.executable, ROOT / "benchmarks/attention.py"]
    small = "--cells 256 --budgets 64 --seconds 0 --layers 1 -t 1 --bandwidth 20 -o json".split()
    done = subprocess.run([*command, "--device", "CPU", *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["about"]["device"] == "CPU" and found["about"]["bandwidth_gb_s"] == 20
    (row,) = found["rows"]
    # K and V of 64 cells and the summaries of 16 pages, each 2 * 8 * 128 numbers of 2 bytes
    assert row["bound_ms"] == pytest.approx(1e3 * (64 + 16) * 4096 / 20e9)
    assert row["speedup"] == pytest.approx(row["flash_ms"] / row["select_ms"])
    done = subprocess.run([*command, "--device", "NONE0", *small], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("--device NONE0: the devices are CPU")
