"""A target of targets.py, guided by coverage: guided.py TARGET CORPUS [arguments of libFuzzer]. tools/fuzz runs it, in
an environment with atheris.

An input may take a second of CPU time, and the process half a GiB more than it has at the beginning.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

import atheris

CPU_SECONDS = 1.0
MEMORY = 512 << 20

name, corpus = sys.argv[1], Path(sys.argv[2])
with atheris.instrument_imports(include=["edgekv"]):
    from targets import TARGETS, work_folder

    folder = work_folder(name)
    run, seeds = TARGETS[name](folder)
    for i, seed in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(seed)
        run(seed)  # also imports what is imported late


def one(data: bytes) -> None:
    begin = time.process_time()
    run(data)
    took = time.process_time() - begin
    if took > CPU_SECONDS:
        raise AssertionError(f"{took:.1f} s for one input")


rest = sys.argv[3:]
given = any(not word.startswith("-") for word in rest)  # then that input alone, a folder beside it would hide it
atheris.Setup([sys.argv[0], *rest, *([] if given else [str(corpus)])], one)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + MEMORY
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    atheris.Fuzz()
finally:
    shutil.rmtree(folder, ignore_errors=True)
