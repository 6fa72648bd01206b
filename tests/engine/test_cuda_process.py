"""CUDA in a process that has other users of it, and in one that was forked. On a fake."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_machine import forked

from bertrt.backends import cuda as ours
from bertrt.backends.cuda.objects import DeviceBuffer, PinnedBuffer, Stream
from bertrt.errors import BackendUnavailableError, DeviceError

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


def test_captures_by_other_code_and_ours_do_not_meet(gpu: Any) -> None:
    """As ONNX Runtime captures: what needs memory, or waits, would fail in every other thread, and spoil it."""
    gpu.foreign_capture = True
    stream, device, pinned = Stream(), DeviceBuffer(1024), PinnedBuffer(1024)
    view = pinned.array(np.uint8, 1024)
    pinned.close()
    stream.copy(device.address, view.ctypes.data, 1024)
    stream.synchronize()
    for thing in (stream, device):
        thing.close()

    def forget() -> None:
        nonlocal view
        del view

    # The last array goes in a thread that has no device.
    thread = threading.Thread(target=forget)
    thread.start()
    thread.join()
    gc.collect()
    assert not gpu.live()
    assert not gpu.foreign_spoilt


def test_the_thread_gets_its_way_with_captures_back(gpu: Any) -> None:
    found = []

    def other() -> None:
        found.append(gpu.mode)
        with ours.on_device(0):
            found.append(gpu.mode)
            with pytest.raises(ZeroDivisionError), ours.on_device(1):
                1 / 0  # noqa: B018
            found.append(gpu.mode)
        found.append(gpu.mode)
        gpu.fail("cuThreadExchangeStreamCaptureMode", E.cudaErrorInvalidValue)
        with (
            pytest.raises(DeviceError, match="GPU 0: it could not keep apart from captures"),
            ours.on_device(0),
        ):
            raise AssertionError("it could be disturbed")
        found.append(gpu.mode)
        gpu.foreign_capture = True
        with pytest.raises(DeviceError, match="StreamCaptureUnsupported"):
            DeviceBuffer(1)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [0, 1, 1, 0, 0]
    # So strict is CUDA towards who has not asked for anything else.
    assert gpu.foreign_spoilt


def test_a_process_that_was_forked_is_told_so_and_gives_nothing_back(gpu: Any) -> None:
    stream, device, pinned = Stream(), DeviceBuffer(1024), PinnedBuffer(1024)
    parent = os.getpid()

    def child() -> None:
        reason = f"process {os.getpid()} was forked from process {parent}, which had used CUDA before"
        problem = str(ours.problem())
        assert reason in problem
        assert "load engines for GPUs after the fork only, or start processes with" in problem
        assert not ours.has_no_gpu()
        with pytest.raises(BackendUnavailableError, match=reason), ours.on_device(0):
            pass
        for thing in (stream, device, pinned):
            thing.close()
        gc.collect()
        assert not gpu.violations

    forked(child)
    assert gpu.live() == {"pinned": 1, "device": 1, "streams": 1}
