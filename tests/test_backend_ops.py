"""The cases for llama.cpp's test-backend-ops, by tools/op-tests: here one CPU variant against another, whose kernels the
compiler made for other instructions. On a GPU the same command compares it with the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv import _runtime

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_cpu_variants_agree():
    baseline = _runtime.lib_path("ggml-cpu-x64")
    if not baseline.exists():
        pytest.skip("the runtime has no CPU variants")
    environment = {**os.environ, "PYTHON": sys.executable, "EDGEKV_LIB_PATH": str(_runtime.lib_dir()),
                   "GGML_BACKEND_PATH": str(baseline)}
    run = subprocess.run([sys.executable, str(ROOT / "tools/op-tests"), "--device", "CPU"], env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "Testing 2 devices" in run.stdout
    counts = {name: [int(n) for n in numbers] for name, *numbers in
              re.findall(r"^CPU: (EDGEKV_\w+): (\d+) ok, (\d+) failed, (\d+) not supported$", run.stdout, re.M)}
    assert len(counts) == 8
    assert all(ok > 200 and failed == missing == 0 for ok, failed, missing in counts.values()), counts
