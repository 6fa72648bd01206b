"""Whose turn it is with CUDA: ONNX Runtime captures graphs in a way that nobody else of the process may disturb.

It begins a capture in CUDA's global mode (seen in ``onnxruntime-gpu`` 1.31), in which no thread may allocate memory
of a GPU or wait for a copy until the capture has ended: both would fail.

Source: https://docs.nvidia.com/cuda/cuda-runtime-api/, ``cudaThreadExchangeStreamCaptureMode``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class CaptureGate:
    """Lets many run, or one capture."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs = 0
        self._loads = 0
        self._waiting = 0
        self._capturing = False

    @contextmanager
    def running(self, *, capture: bool = False) -> Iterator[bool]:
        """Do something with a GPU; whether it may capture.

        Args:
            capture: ask for that. It is granted when all that runs has ended, and refused while something is loaded,
                which can take minutes.
        """
        alone = capture and self._alone()
        if not alone:
            with self._changed:
                # Who waits to capture goes first, or would never be alone.
                self._changed.wait_for(lambda: not self._capturing and not self._waiting)
                self._runs += 1
        try:
            yield alone
        finally:
            with self._changed:
                if alone:
                    self._capturing = False
                else:
                    self._runs -= 1
                self._changed.notify_all()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Do something with a GPU that may take long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._loads += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._loads -= 1
                self._changed.notify_all()

    def _alone(self) -> bool:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._loads or not (self._capturing or self._runs))
                self._capturing = not self._loads
                return self._capturing
            finally:
                self._waiting -= 1
                self._changed.notify_all()


# One for the process, as CUDA has it.
GATE: Final = CaptureGate()
