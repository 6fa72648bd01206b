"""What a model of BERT-base's size takes of memory: its weights once, for all the processes that map them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

pytest.importorskip("bertrt._native", reason="the native kernels are not built")
if not Path("/proc/self/smaps").is_file():
    pytest.skip(
        "the system tells nothing of a process's mappings (/proc/self/smaps)", allow_module_level=True
    )

MEGABYTE = 1_000_000

# Answers one sequence, tells what it occupies, and stays until its standard input is closed.
PROGRAM = """
import json, re, sys
import numpy as np
from bertrt import Engine
from bertrt.backends.base import TokenBatch, Wanted

engine = Engine.load(sys.argv[1], backend="native", threads=1)
ids = np.arange(64, dtype=np.int32)
batch = TokenBatch(ids, np.zeros_like(ids), np.array([0, 64]))
# The head too, which reads the whole vocabulary's rows.
output = engine.backend.run(batch, Wanted(mlm_positions=np.array([3]), mlm_top_k=5, pooled=True))
assert np.isfinite(output.mlm_top_log_probs).all()

found = {}
here = False
with open("/proc/self/smaps") as lines:
    for line in lines:
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.rstrip().endswith("/model.bertrt")
        elif here and line.rstrip().endswith(" kB"):
            name, size = line.split(":")
            found[name] = found.get(name, 0) + int(size.split()[0]) * 1024
with open("/proc/self/status") as lines:
    found["resident"] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def base_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "engine"
    with open_checkpoint("bert-base-cased", random=True) as checkpoint:
        export_engine(checkpoint, out, precision="int8", backends=["native"])
    return out


def test_processes_share_the_weights(base_engine: Path) -> None:
    processes: list[subprocess.Popen[str]] = []
    found = []
    try:
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(base_engine)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
            assert process.stdout
            # It has ended without a line where it failed; its error is on standard error.
            found.append(json.loads(process.stdout.readline() or "null"))
            assert found[-1]
    finally:
        for process in processes:
            process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    for memory in found:
        # The interpreter, NumPy and the tokenizer; the weights once, and no second copy of them.
        assert memory["resident"] < 220 * MEGABYTE, memory
    # A page is dirty as long as it is not on disk yet, whoever wrote it.
    second = found[1]
    assert second["Shared_Clean"] + second["Shared_Dirty"] > 100 * MEGABYTE, second
    assert second["Private_Clean"] + second["Private_Dirty"] < MEGABYTE, second
