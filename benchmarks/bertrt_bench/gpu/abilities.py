"""What can be done on this machine, and why not the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bertrt.errors import BackendUnavailableError
from bertrt.manifest import Precision
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import LEAST_CAPABILITY, ORT_CUDA, TENSORRT

# Which backend answers the drift check, best first, and what it needs.
_DRIFT_BACKENDS: Final = ((TENSORRT, "tensorrt"), (ORT_CUDA, "onnxruntime:cuda"))
_REHEARSED: Final = "onnxruntime:cpu"


class Abilities:
    """Says whether a step can be taken.

    Args:
        libraries: what was found of each, see `bertrt_bench.gpu.jobs.probe`.
        gpu: ``None`` in a rehearsal.
    """

    def __init__(self, libraries: Mapping[str, Mapping[str, str | None]], gpu: Gpu | None) -> None:
        self._libraries = libraries
        self._gpu = gpu

    @property
    def builds_plans(self) -> bool:
        """Whether TensorRT is here."""
        return self._gpu is not None and self._problem(TENSORRT) is None

    def require(self, *libraries: str) -> None:
        """Check that libraries can be used.

        Raises:
            BackendUnavailableError: one cannot; says why.
        """
        problems = [problem for library in libraries if (problem := self._problem(library)) is not None]
        if problems:
            raise BackendUnavailableError("; ".join(problems))

    def require_precision(self, precision: Precision) -> None:
        """Check that the GPU computes in a precision.

        Raises:
            BackendUnavailableError: it does not.
        """
        least = LEAST_CAPABILITY.get(precision)
        if self._gpu is None or least is None:
            return
        found = self._gpu.facts.compute_capability
        if tuple(map(int, found.split("."))) < least:
            raise BackendUnavailableError(
                f"{precision} needs a GPU of compute capability {least[0]}.{least[1]}, this one has {found}"
            )

    def engine_backend(self) -> str:
        """The best backend for an engine, as ``NAME`` or ``NAME:PROVIDER``.

        Raises:
            BackendUnavailableError: none runs an engine on this GPU; says why.
        """
        if self._gpu is None:
            return _REHEARSED
        problems = []
        for library, backend in _DRIFT_BACKENDS:
            problem = self._problem(library)
            if problem is None:
                return backend
            problems.append(problem)
        raise BackendUnavailableError(f"nothing here runs an engine on the GPU: {'; '.join(problems)}")

    def _problem(self, library: str) -> str | None:
        found = self._libraries.get(library)
        return f"{library} was not looked for" if found is None else found["problem"]
