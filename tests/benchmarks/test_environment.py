"""Variables that workers get, and those that a record keeps."""

from __future__ import annotations

from pathlib import Path

from bertrt_bench.environment import recorded_environment, worker_environment


def test_the_environment_of_a_worker() -> None:
    base = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "64",
        "OMP_PROC_BIND": "true",
        "GOMP_CPU_AFFINITY": "0",
        "KMP_BLOCKTIME": "0",
        "MKL_DYNAMIC": "TRUE",
        "PYTHONPATH": "/here",
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONSTARTUP": "/home/me/startup.py",
    }
    found = worker_environment(base, threads=3, scratch=Path("/scratch"))
    assert {name: value for name, value in found.items() if name.startswith("PYTHON")} == {
        "PYTHONPATH": "/here"
    }
    assert {value for name, value in found.items() if name.endswith("_NUM_THREADS")} == {"3"}
    # Sizes alone are left: no binding, no waiting.
    pools = {name for name in found if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    assert pools == {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    assert found["PATH"] == "/bin"
    assert found["TMPDIR"] == "/scratch"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert base["OMP_NUM_THREADS"] == "64"


def test_what_a_record_keeps_of_the_environment() -> None:
    base = {
        "PATH": "/bin",
        "BERTRT_PIN_THREADS": "1",
        "BERTRT_ISA": "avx2",
        "BERTRT_CACHE": "/home/me/cache",
        "BERTRT_TRACEBACK": "1",
        "MALLOC_ARENA_MAX": "2",
        "LD_PRELOAD": "/usr/lib/libjemalloc.so.2:/opt/x/libabacus.so",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "default",
    }
    found = recorded_environment(base)
    assert list(found) == sorted(found)
    # Nothing of the machine's folders.
    assert found == {
        "ATEN_CPU_CAPABILITY": "default",
        "BERTRT_ISA": "avx2",
        "BERTRT_PIN_THREADS": "1",
        "LD_PRELOAD": "libjemalloc.so.2:libabacus.so",
        "MALLOC_ARENA_MAX": "2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    assert recorded_environment({"PATH": "/bin"}) == {}
