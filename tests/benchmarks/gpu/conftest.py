"""A driver that the tests make up, small checkpoints, and steps of fake contestants."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from bertrt_bench.gpu.clock import Clock, Share
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import Contender, Step, sdpa


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a compiled ``nvml.c``."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")
    library = tmp_path_factory.mktemp("nvml") / "libfake-nvml.so"
    source = Path(__file__).parent / "nvml.c"
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    return str(library)


@pytest.fixture
def fake_gpu(nvml: str) -> Iterator[Gpu]:
    """A GPU of compute capability 8.9 that the fake driver tells of; nothing computes on it."""
    with Gpu(nvml, {}) as gpu:
        yield gpu


@pytest.fixture
def share() -> Share:
    """More time than any test takes."""
    return long_share()


def long_share() -> Share:
    found = Clock(seconds=10_000).share(600)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def small_checkpoint(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    """The folder of a small random BERT."""
    return save_checkpoint(small_bert())


@pytest.fixture
def enter() -> Callable[..., Step]:
    """A function that makes the step of a fake contestant of ``bench_fakes``."""

    def make(name: str, *, seconds: float = 120, **changes: object) -> Step:
        base = replace(sdpa("fp32", "cpu"), name=name, factory=f"bench_fakes:open_{name}", needs=())
        contender: Contender = replace(base, **changes)
        return Step(kind="contestant", name=name, seconds=seconds, contender=contender)

    return make
