"""The GPU as its driver sees it: NVML, the management library that comes with every NVIDIA driver.

The parent process looks at the GPU without using it: no CUDA context is made, so that nothing of its own lies in the
memory that it measures. Functions and structures are those of ``nvml.h``
(https://docs.nvidia.com/deploy/nvml-api).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from bertrt.errors import BackendUnavailableError, InputError

LIBRARY: Final = "libnvidia-ml.so.1"
# With this order CUDA counts GPUs as NVML does; its own order puts the fastest first.
_ORDER: Final = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_TEXT: Final = 96
_OK: Final = 0
_CLOCK_SM: Final = 1
_CLOCK_MEMORY: Final = 2
_TEMPERATURE_GPU: Final = 0
_ADVICE: Final = (
    "run on a machine with an NVIDIA GPU and its driver, or rehearse the script with --device cpu"
)


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What a GPU is.

    Attributes:
        name: such as ``NVIDIA L4``.
        compute_capability: such as ``8.9``.
        memory_bytes: all that it has.
        used_bytes: what of it was in use when it was looked at first; more than a driver's own share means that
            others use it too.
        driver: the driver's version.
        cuda: the newest CUDA that the driver runs, such as ``13.0``.
        power_limit_w: what it may draw, ``None`` where it does not say.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    used_bytes: int
    driver: str
    cuda: str
    power_limit_w: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """How a GPU is at a moment; ``None`` for what it does not say.

    Attributes:
        sm_mhz: clock of its processors.
        memory_mhz: clock of its memory.
        temperature_c: of the chip.
        power_w: what it draws.
    """

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class Gpu:
    """One GPU, looked at through NVML; a context manager.

    It is the first that ``CUDA_VISIBLE_DEVICES`` shows, or the first of all.

    Args:
        library: the name of NVML.
        environment: where ``CUDA_VISIBLE_DEVICES`` is looked up.

    Raises:
        BackendUnavailableError: there is no driver, no GPU, or none is visible.
        InputError: ``CUDA_VISIBLE_DEVICES`` names a GPU that is not there.
    """

    def __init__(self, library: str = LIBRARY, environment: Mapping[str, str] = os.environ) -> None:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise BackendUnavailableError(
                f"no GPU here: the NVIDIA driver's library {library} cannot be loaded; {_ADVICE}"
            ) from error
        self._nvml.nvmlErrorString.restype = ctypes.c_char_p
        if code := self._nvml.nvmlInit_v2():
            raise BackendUnavailableError(
                f"no GPU here: the NVIDIA driver does not start ({self._problem(code)}); {_ADVICE}"
            )
        try:
            count = ctypes.c_uint()
            self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
            if not count.value:
                raise BackendUnavailableError(f"no GPU here: the NVIDIA driver sees none; {_ADVICE}")
            self._visible = _first_visible(environment)
            self._handle = self._find(self._visible)
            self.facts = self._facts()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which CUDA sees this GPU alone, as its first."""
        return dict([_ORDER]) | {_VISIBLE: self._visible}

    def used_bytes(self) -> int:
        """Memory in use now, by whomever."""
        return int(self._memory().used)

    def state(self) -> GpuState:
        """Clocks, temperature and power now."""
        power = self._number("nvmlDeviceGetPowerUsage")
        return GpuState(
            sm_mhz=self._number("nvmlDeviceGetClockInfo", _CLOCK_SM),
            memory_mhz=self._number("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
            temperature_c=self._number("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
        )

    def close(self) -> None:
        """Let go of NVML."""
        self._nvml.nvmlShutdown()

    def __enter__(self) -> Gpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _facts(self) -> GpuFacts:
        major, minor, cuda = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call(
            "nvmlDeviceGetCudaComputeCapability", self._handle, ctypes.byref(major), ctypes.byref(minor)
        )
        # As CUDA writes it: 1000 times the major and 10 times the minor number.
        self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        limit, memory = self._number("nvmlDeviceGetEnforcedPowerLimit"), self._memory()
        return GpuFacts(
            name=self._text("nvmlDeviceGetName", self._handle),
            compute_capability=f"{major.value}.{minor.value}",
            memory_bytes=memory.total,
            used_bytes=memory.used,
            driver=self._text("nvmlSystemGetDriverVersion"),
            cuda=f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            power_limit_w=None if limit is None else limit / 1000,
        )

    def _find(self, visible: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        if visible.isdecimal():
            code = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(visible)), ctypes.byref(handle))
        else:
            code = self._nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(handle))
        if code != _OK:
            raise InputError(
                f"{_VISIBLE} names the GPU {visible!r}, which the driver does not find ({self._problem(code)}); "
                "name one that nvidia-smi --list-gpus shows"
            )
        return handle

    def _memory(self) -> _Memory:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory))
        return memory

    def _number(self, function: str, *arguments: int) -> int | None:
        """A number that not every GPU gives."""
        value = ctypes.c_uint()
        # Nor does every driver: old functions go.
        ask = getattr(self._nvml, function, None)
        if ask is None or ask(self._handle, *map(ctypes.c_uint, arguments), ctypes.byref(value)) != _OK:
            return None
        return value.value

    def _text(self, function: str, *arguments: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(_TEXT)
        self._call(function, *arguments, buffer, ctypes.c_uint(_TEXT))
        return buffer.value.decode("utf-8", "replace")

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._nvml, function)(*arguments)
        if code != _OK:
            raise BackendUnavailableError(
                f"the NVIDIA driver does not tell what the GPU is: {function} failed ({self._problem(code)}); "
                "look at what nvidia-smi says"
            )

    def _problem(self, code: int) -> str:
        return (self._nvml.nvmlErrorString(code) or b"unknown error").decode("utf-8", "replace")


def _first_visible(environment: Mapping[str, str]) -> str:
    first = environment.get(_VISIBLE, "0").partition(",")[0].strip()
    # CUDA stops reading at the first entry that is no GPU.
    if not first or first.startswith("-"):
        raise BackendUnavailableError(
            f"{_VISIBLE}={environment.get(_VISIBLE)!r} hides every GPU; name one, or leave it unset"
        )
    return first
