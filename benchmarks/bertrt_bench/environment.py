"""The variables of the environment that workers get, and those that a record keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

# Each of these sizes the thread pool of some numeric library.
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
# What else steers those pools (binding, waiting, nesting) would meet the rivals alone, as our engine has a pool of its
# own.
_POOL_PREFIXES: Final = ("OMP_", "KMP_", "GOMP_", "MKL_")
# Where Python finds its modules. All other PYTHON* variables change how the interpreter starts, ends or
# reports.
_PYTHON_VARIABLES: Final = frozenset(
    {
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONPLATLIBDIR",
        "PYTHONNOUSERSITE",
        "PYTHONUSERBASE",
        "PYTHONPYCACHEPREFIX",
        "PYTHONDONTWRITEBYTECODE",
    }
)

# Variables that reach workers and change figures: our own, those of the allocator, and those that keep libraries from
# instruction sets.
_RECORDED_PREFIXES: Final = ("BERTRT_", "MALLOC_", "ONEDNN_", "DNNL_")
_RECORDED: Final = frozenset({"LD_PRELOAD", "GLIBC_TUNABLES", "ATEN_CPU_CAPABILITY"})
# Those of our variables that change no figure.
_HARMLESS: Final = frozenset({"BERTRT_CACHE", "BERTRT_TRACEBACK"})
_LISTS_OF_FILES: Final = frozenset({"LD_PRELOAD"})


def worker_environment(base: Mapping[str, str], threads: int, scratch: Path) -> dict[str, str]:
    """The environment of a worker.

    As many threads everywhere, no network, an undisturbed interpreter, and temporary files of libraries in a
    folder that is removed with the benchmark's.
    """
    environment = {
        name: value
        for name, value in base.items()
        if not name.startswith(_POOL_PREFIXES)
        and (not name.startswith("PYTHON") or name in _PYTHON_VARIABLES)
    }
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    environment.update(
        TMPDIR=str(scratch),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
    )
    return environment


def recorded_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a record tells of the environment: by name, the variables that change figures.

    Of files the names alone, so that a record tells nothing about the machine's folders. ``BERTRT_ISA`` is among them
    though the engine's details have the instruction set: it was asked for.
    """
    return {
        name: _names(value) if name in _LISTS_OF_FILES else value
        for name, value in sorted(base.items())
        if name not in _HARMLESS and (name in _RECORDED or name.startswith(_RECORDED_PREFIXES))
    }


def _names(files: str) -> str:
    return ":".join(Path(file).name for file in files.replace(" ", ":").split(":") if file)
