"""CUDA through its bindings: what is said when it cannot be used, memory, streams, graphs, errors. On a fake, and
without one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda.bindings.runtime
import fake_cuda
import numpy as np
import pytest

from bertrt.backends import cuda as ours
from bertrt.backends.cuda.downloads import Downloads
from bertrt.backends.cuda.objects import ALIGNMENT, DeviceBuffer, Event, PinnedBuffer, Stream, aligned
from bertrt.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    InputError,
)

E = fake_cuda.cudaError_t


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two GPUs, of which 1 is current."""
    fake = fake_cuda.Gpu(2)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake.runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake.driver_module)
    with ours.on_device(1):
        yield fake
    assert not fake.violations


# Without a fake.


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_no_gpu_without_a_fake(tmp_path: Path) -> None:
    """In a process of its own, which sees no GPU even where there is one."""
    program = (
        "from bertrt.backends import cuda\n"
        "from bertrt.backends.tensorrt.backend import check_devices\n"
        "from bertrt.errors import BackendUnavailableError\n"
        "print(cuda.problem())\n"
        "print(cuda.device_count())\n"
        "try:\n"
        "    check_devices([0])\n"
        "except BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    problem, count, error = done.stdout.splitlines()
    if has_driver():
        assert (
            problem
            == "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES is ''); 'nvidia-smi' lists those that there are"
        )
    else:
        assert problem.startswith("no NVIDIA driver was found; install it, or give the container its GPUs")
    assert count == "0"
    assert error == problem


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    problem = ours.problem()
    assert problem is not None
    assert 'is not installed; pip install "bertrt[tensorrt]"' in problem
    assert ours.device_count() == 0
    # Which only the driver's own library can tell then.
    assert ours.has_no_gpu() is not has_driver()
    with pytest.raises(BackendUnavailableError, match="not installed"):
        ours.device_properties(0)


def test_bindings_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "cuda.bindings.runtime")
    monkeypatch.setattr("bertrt.backends.cuda.importlib.import_module", fail)
    assert "is installed but does not load (libcudart.so.13" in str(ours.problem())


def test_errors_that_lose_a_device_are_known_to_the_bindings() -> None:
    known = {error.name for error in cuda.bindings.runtime.cudaError_t}
    assert known >= ours._LOST
    assert ours._OUT_OF_MEMORY in known


# What there is.


def test_devices(gpu: Any) -> None:
    assert ours.problem() is None
    assert not ours.has_no_gpu()
    assert ours.device_count() == 2
    found = ours.device_properties(1)
    assert (found.name, found.compute_capability, found.memory_bytes) == ("Imaginary GPU 1", "8.9", 1 << 30)
    for index in (2, -1, True, "0"):
        with pytest.raises(InputError, match=r"there is no GPU .*: there are 2 GPUs, 0 to 1"):
            ours.device_properties(index)  # type: ignore[arg-type]
    gpu.count = 1
    with pytest.raises(InputError, match="there is no GPU 1: there is one GPU, 0"):
        ours.device_properties(1)


def test_what_is_missing(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver = 12040
    assert "the NVIDIA driver is too old: it knows CUDA 12.4, cuda-bindings is for CUDA 13.0" in str(
        ours.problem()
    )
    # There is one, and something can be done.
    assert not ours.has_no_gpu()
    gpu.driver = 0
    assert "no NVIDIA driver was found" in str(ours.problem())
    assert ours.has_no_gpu()
    gpu.driver, gpu.count = 13050, 0
    assert ours.has_no_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ours.problem() == "the NVIDIA driver sees no GPU; 'nvidia-smi' lists those that there are"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "(CUDA_VISIBLE_DEVICES is '7')" in str(ours.problem())
    for _ in range(2):
        gpu.fail("cudaGetDeviceCount", E.cudaErrorInitializationError)
    assert not ours.has_no_gpu()
    assert "CUDA does not start: InitializationError (cudaErrorInitializationError)" in str(ours.problem())
    assert ours.device_count() == 0


def test_the_thread_gets_its_device_back(gpu: Any) -> None:
    with ours.on_device(0):
        assert gpu.current == 0
        with pytest.raises(ZeroDivisionError), ours.on_device(1):
            1 / 0  # noqa: B018
        assert gpu.current == 0
    assert gpu.current == 1
    found = []

    def other() -> None:
        with ours.on_device(1):
            found.append(gpu.current)
        found.append(gpu.current)

    gpu.contexts.clear()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    # It had none before, and no context was made on device 0 to give it back.
    assert found == [1, None]
    assert gpu.contexts == {1}


# Memory and streams.


def test_memory_goes_to_the_device_and_back(gpu: Any) -> None:
    stream, device = Stream(), DeviceBuffer(4000)
    source, target = PinnedBuffer(4000), PinnedBuffer(4000)
    assert device.address % ALIGNMENT == 0
    values = np.arange(1000, dtype=np.int32)
    source.array(np.int32, (20, 50))[...] = values.reshape(20, 50)
    stream.copy(device.address, source.address, 4000)
    stream.copy(target.address + 400, device.address, 3600)
    # The fake is as lazy as it may be.
    assert (target.array(np.uint8, 4000) == 0xFF).all()
    stream.synchronize()
    np.testing.assert_array_equal(target.array(np.int32, 900, 400), values[:900])
    assert ours.memory_info() == ((1 << 30) - 4000, 1 << 30)
    for thing in (stream, device, source, target):
        thing.close()
        thing.close()
    assert not gpu.live()


def test_pinned_memory_outlives_its_buffer_as_long_as_an_array_looks(gpu: Any) -> None:
    buffer = PinnedBuffer(1000)
    view = buffer.array(np.float32, (2, 5), 512)[1:]
    view[...] = 3
    buffer.close()
    assert gpu.live() == {"pinned": 1}
    assert view.tolist() == [[3] * 5]
    with pytest.raises(ValueError, match="bytes 0 to 4 of 0"):
        buffer.array(np.float32, 1)
    del view
    gc.collect()
    assert not gpu.live()


def test_a_view_beyond_the_end(gpu: Any) -> None:
    buffer = PinnedBuffer(1000)
    with pytest.raises(ValueError, match="bytes 800 to 1004 of 1000"):
        buffer.array(np.float32, 51, 800)


def test_a_graph_runs_again_with_what_lies_there_then(gpu: Any) -> None:
    stream, device, source = Stream(), DeviceBuffer(1024), PinnedBuffer(1024)
    target, event = PinnedBuffer(1024), Event()
    graph = stream.capture(lambda: stream.copy(device.address, source.address, 1024))
    for value in (3, 4):
        source.array(np.uint8, 1024)[...] = value
        graph.launch()
        stream.copy(target.address, device.address, 1024)
        event.record(stream)
        event.synchronize()
        assert (target.array(np.uint8, 1024) == value).all()
    # The record of the capture is not kept, only what is launched.
    assert gpu.live() == {"pinned": 2, "device": 1, "streams": 1, "events": 1, "executables": 1, "graph": 1}
    for thing in (graph, event, stream, device, source, target):
        thing.close()
        thing.close()
    assert not gpu.live()


def test_a_capture_that_fails_leaves_the_stream_usable(gpu: Any) -> None:
    stream, device, source = Stream(), DeviceBuffer(1024), PinnedBuffer(1024)
    copy = lambda: stream.copy(device.address, source.address, 1024)  # noqa: E731
    with pytest.raises(DeviceError, match="StreamCaptureUnsupported"):
        stream.capture(stream.synchronize)
    with pytest.raises(DeviceError, match="StreamCaptureUnsupported"):
        stream.capture(lambda: DeviceBuffer(1))  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        stream.capture(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    gpu.fail("cudaGraphInstantiate", E.cudaErrorMemoryAllocation)
    with pytest.raises(DeviceMemoryError):
        stream.capture(copy)
    gpu.fail("cudaStreamEndCapture", E.cudaErrorStreamCaptureInvalidated)
    with pytest.raises(DeviceError, match="StreamCaptureInvalidated"):
        stream.capture(copy)
    assert gpu.live() == {"pinned": 1, "device": 1, "streams": 1}
    stream.copy(device.address, source.address, 1024)
    stream.synchronize()


@pytest.mark.parametrize("piece", [256, 1024, 1 << 20])
def test_downloads_come_through_pieces_of_any_size(gpu: Any, piece: int) -> None:
    generator = np.random.default_rng(0)
    stream, made = Stream(), ExitStack()
    downloads = Downloads(stream, piece, made)
    arrays = [
        generator.standard_normal((37, 11)).astype(np.float32),
        generator.integers(0, 1 << 40, (5, 64)),
        np.zeros((0, 4), np.float32),
        generator.standard_normal((1, 1)).astype(np.float32),
        generator.integers(0, 1 << 40, 512),
    ]
    places = []
    for array in arrays:
        source, device = PinnedBuffer(array.nbytes), DeviceBuffer(array.nbytes)
        source.array(array.dtype, array.shape)[...] = array
        stream.copy(device.address, source.address, array.nbytes)
        stream.synchronize()
        source.close()
        places.append(device)
    found = [np.empty_like(array) for array in arrays]
    downloads.fetch([(place.address, array) for place, array in zip(places, found, strict=True)])
    for one, other in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    # Two pieces, whatever comes through them.
    assert gpu.live()["events"] == 2
    assert gpu.live()["pinned"] == 2
    made.close()
    assert gpu.live()["events"] == 0


def test_aligned() -> None:
    assert [aligned(size) for size in (0, 1, 256, 257)] == [0, 256, 256, 512]


# Errors.


def test_out_of_memory_says_how_much_there_is_and_what_to_do(gpu: Any) -> None:
    held = DeviceBuffer(900_000_000)
    with pytest.raises(DeviceMemoryError) as caught:
        DeviceBuffer(200_000_000)
    assert str(caught.value) == (
        "GPU 1: not enough memory to hold the engine, which needs 200.0 MB; 173.7 MB of 1.1 GB are free "
        "(MemoryAllocation (cudaErrorMemoryAllocation)). Free some ('nvidia-smi' shows who holds it), take another GPU "
        "(devices), or build the plan for smaller blocks (bertrt build --profile)"
    )
    held.close()
    gpu.fail("cudaHostAlloc", E.cudaErrorMemoryAllocation)
    with pytest.raises(DeviceMemoryError, match=r"cannot pin memory of the host, which needs 5\.0 MB"):
        PinnedBuffer(5_000_000)


def test_an_illegal_address_loses_the_device(gpu: Any) -> None:
    stream, source = Stream(), PinnedBuffer(1024)
    stream.copy(12345, source.address, 1024)
    with pytest.raises(DeviceLostError, match=r"GPU 1: lost, as it could not finish a run: IllegalAddress"):
        stream.synchronize()
    with pytest.raises(DeviceLostError, match="Only a new process can use it again"):
        DeviceBuffer(1)
    # What was held is given back without a word.
    stream.close()
    source.close()
    with pytest.raises(DeviceLostError), ours.on_device(1):
        raise AssertionError("a lost device cannot be made current")
    with ours.on_device(0):
        DeviceBuffer(1).close()


@pytest.mark.parametrize(
    "error", ["ECCUncorrectable", "LaunchFailure", "Unknown", "InitializationError", "NoDevice"]
)
def test_other_errors_that_lose_it(gpu: Any, error: str) -> None:
    gpu.fail("cudaStreamCreateWithFlags", E[f"cudaError{error}"])
    with pytest.raises(DeviceLostError, match=rf"could not make a stream: {error} \(cudaError{error}\)"):
        Stream()


def test_an_error_that_does_not(gpu: Any) -> None:
    gpu.fail("cudaStreamCreateWithFlags", E.cudaErrorInvalidValue)
    with pytest.raises(DeviceError, match="GPU 1: it could not make a stream") as caught:
        Stream()
    assert type(caught.value) is DeviceError
    # Nobody finds it as the last error.
    assert gpu.calls[-2:] == ["cudaGetErrorString", "cudaGetLastError"]
    Stream().close()
