"""The backend on our own kernels (``kernels/``, built into ``bertrt._native``).

It never pads: a packed batch goes in as it is, and the answer to a sequence is the same bit for bit alone, in any
batch and with any number of threads, on the same instruction set.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bertrt.backends.base import BatchOutput, Float32, TokenBatch, Wanted, check_request
from bertrt.errors import (
    BackendRunError,
    BackendUnavailableError,
    BertRTError,
    EngineClosedError,
    InputError,
    KernelsNotBuiltError,
    ManifestError,
    MissingFileError,
    MissingHeadError,
    ShapeMismatchError,
    WeightFileError,
)
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt.manifest import Manifest

if TYPE_CHECKING:
    from bertrt import _native

NAME: Final = "native"
ISA_VARIABLE: Final = "BERTRT_ISA"
PIN_VARIABLE: Final = "BERTRT_PIN_THREADS"
HUGE_VARIABLE: Final = "BERTRT_HUGE_PAGES"

_MODULE: Final = "bertrt._native"
_ERRORS: Final[Mapping[str, type[BertRTError]]] = {
    "invalid_argument": InputError,
    "not_found": MissingFileError,
    "bad_file": WeightFileError,
    "missing_head": MissingHeadError,
    "unsupported": BackendUnavailableError,
    "out_of_memory": BackendRunError,
    "system": BackendRunError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """An instruction set that there are kernels for.

    Attributes:
        name: such as ``"avx512-vnni"``.
        active: whether engines that are loaded now use it.
        reason: why it cannot be used here, else an empty string.
    """

    name: str
    active: bool
    reason: str


class NativeBackend:
    """Runs an engine folder's weight file with the native kernels.

    The environment variable ``BERTRT_ISA`` names the instruction set (by default the best that the processor
    has), ``BERTRT_PIN_THREADS=1`` binds each thread to a processor, and ``BERTRT_HUGE_PAGES=1`` copies the
    weights into pages of 2 MB, which the process then has for itself.

    Args:
        folder: the engine; whoever opened it has compared the weight file's SHA-256, or chose not to.
        threads: of each run; by default the CPUs that the process may use.

    Raises:
        BackendUnavailableError: the kernels are not built, or not for the instruction set that was asked for,
            or huge pages are asked for where the system has them switched off.
        WeightFileError: the weight file is corrupt or foreign.
        ShapeMismatchError: it is not the one of the manifest's architecture, precision and heads.
        InputError: ``BERTRT_PIN_THREADS`` or ``BERTRT_HUGE_PAGES`` is neither 0 nor 1.
        BackendRunError: not enough memory or threads.
    """

    def __init__(self, folder: EngineFolder, *, threads: int | None = None) -> None:
        manifest = folder.manifest
        if "weights" not in manifest.backends[NAME]:
            raise ManifestError(f"engine.json: backend {NAME!r} names no 'weights'; export the engine again")
        path = folder.file(manifest.backends[NAME]["weights"])
        kernels, pin, huge = load_kernels(), pins_threads(), takes_huge_pages()
        try:
            engine = kernels.Engine(
                str(path), threads=threads or usable_cpus(), pin=pin, verify=False, huge=huge
            )
        except (kernels.Error, MemoryError) as error:
            raise _error(error, "the native backend cannot load the engine") from error
        _check_architecture(engine.architecture, manifest)
        self._kernels = kernels
        self._engine: _native.Engine | None = engine
        self._architecture = manifest.architecture
        self._heads = manifest.heads
        self._threads: int = engine.threads
        self._isa: str = engine.isa

    @property
    def name(self) -> str:
        """``"native"``."""
        return NAME

    @property
    def threads(self) -> int:
        """Threads of one run."""
        return self._threads

    @property
    def pads(self) -> bool:
        """Never."""
        return False

    @property
    def isa(self) -> str:
        """The instruction set in use, such as ``"avx512-vnni"``."""
        return self._isa

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        """See `bertrt.backends.base.Backend.run`."""
        check_request(batch, wanted, self._architecture, self._heads)
        options = _options(wanted)
        return BatchOutput(**self._run(batch, options)) if options else self._nothing()

    def run_layers(self, batch: TokenBatch) -> Float32:
        """The embeddings' output and each layer's, ``[layers + 1, tokens, hidden] float32``, packed as the batch.

        Raises:
            BackendRunError, EngineClosedError, InputError: as `run`.
        """
        check_request(batch, Wanted(), self._architecture, self._heads)
        layers: Float32 = self._run(batch, {"layers": True})["layers"]
        return layers

    def close(self) -> None:
        """Let go of the engine; runs under way still have it, and end as if nothing had happened."""
        self._engine = None

    def _nothing(self) -> BatchOutput:
        self._opened()
        return BatchOutput()

    def _opened(self) -> _native.Engine:
        engine = self._engine
        if engine is None:
            raise EngineClosedError("the engine is closed; load it again")
        return engine

    def _run(self, batch: TokenBatch, options: dict[str, Any]) -> dict[str, Any]:
        engine = self._opened()
        # The kernels read plain memory: what is a view with gaps is copied.
        arrays = map(np.ascontiguousarray, (batch.input_ids, batch.token_type_ids, batch.offsets))
        try:
            return engine.run(*arrays, **options)
        except (self._kernels.Error, MemoryError) as error:
            asked = f"a batch (sequences: {batch.num_sequences}, tokens: {batch.num_tokens})"
            raise _error(error, f"the native backend failed on {asked}") from error


def load_kernels() -> ModuleType:
    """The module of the kernels, ``bertrt._native``.

    Raises:
        KernelsNotBuiltError: it is not built; says what to do.
        BackendUnavailableError: it is built, but does not load.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == _MODULE:
            raise KernelsNotBuiltError(
                "the native kernels are not built: bertrt was installed with BERTRT_KERNELS=OFF; "
                "install it again without, where there is GCC 12 or Clang 15, or later ones"
            ) from error
        raise BackendUnavailableError(
            f"the native kernels are built but do not load ({error}); install bertrt again on this machine"
        ) from error


def instruction_sets() -> list[InstructionSet]:
    """Those that there are kernels for, best first, and why some cannot be used here.

    None is active when ``BERTRT_ISA`` names one that cannot be.

    Raises:
        BackendUnavailableError: the kernels are not built, or do not load.
    """
    kernels = load_kernels()
    try:
        active = kernels.active_isa()
    except kernels.Error:
        active = None
    return [
        InstructionSet(name=name, active=name == active, reason=problem)
        for name, problem in kernels.isa_status()
    ]


def active_isa() -> str:
    """The instruction set that an engine loaded now would use.

    Raises:
        BackendUnavailableError: the kernels are not built, or ``BERTRT_ISA`` names what cannot be used here.
    """
    kernels = load_kernels()
    try:
        isa: str = kernels.active_isa()
    except kernels.Error as error:
        raise BackendUnavailableError(str(error)) from error
    return isa


def pins_threads() -> bool:
    """Whether ``BERTRT_PIN_THREADS`` asks for threads that stay on one processor each.

    Raises:
        InputError: it is set to anything but 0 and 1.
    """
    return _switched_on(PIN_VARIABLE)


def takes_huge_pages() -> bool:
    """Whether ``BERTRT_HUGE_PAGES`` asks for a copy of the weights in pages of 2 MB.

    Raises:
        InputError: it is set to anything but 0 and 1.
    """
    return _switched_on(HUGE_VARIABLE)


def _switched_on(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in {"", "0", "1"}:
        raise InputError(f"{variable} must be 0 or 1, got {value!r}; correct the variable or unset it")
    return value == "1"


def _options(wanted: Wanted) -> dict[str, Any]:
    """The keywords of the kernels' ``run``; none when nothing is wanted."""
    options: dict[str, Any] = {
        name: True for name in ("hidden_states", "pooled", "nsp") if getattr(wanted, name)
    }
    if wanted.mlm_logits or wanted.mlm_top_k or wanted.mlm_candidates is not None:
        # check_request has seen that there are positions.
        options["mlm_positions"] = np.ascontiguousarray(wanted.mlm_positions)
        options["mlm_logits"] = wanted.mlm_logits
        options["top_k"] = wanted.mlm_top_k
        if wanted.mlm_candidates is not None:
            options["candidates"] = np.ascontiguousarray(wanted.mlm_candidates)
    return options


def _check_architecture(found: Mapping[str, int | float | str | bool], manifest: Manifest) -> None:
    heads = manifest.heads
    expected = {
        **manifest.architecture.to_json(),
        # The file holds it as float32.
        "layer_norm_eps": float(np.float32(manifest.architecture.layer_norm_eps)),
        "precision": manifest.precision,
        "mlm": heads.mlm,
        "nsp": heads.nsp,
        "pooler": heads.pooler,
    }
    for name, value in expected.items():
        if found.get(name) != value:
            raise ShapeMismatchError(
                f"the weight file was written for {name} {found.get(name, 'unknown')}, the manifest says {value}; "
                "export the engine again"
            )


def _error(error: BaseException, doing: str) -> BertRTError:
    """The error of ours that says what a failure of the kernels means."""
    code = "out_of_memory" if isinstance(error, MemoryError) else getattr(error, "code", "system")
    # What the kernels' own messages cannot know. Of a bad file they say themselves what to do.
    advice = {
        "not_found": "; copy the folder again or export it anew",
        "out_of_memory": "; ask for less at once (token_budget), or run where there is more memory",
    }.get(code, "")
    # A MemoryError says nothing.
    reason = str(error).rstrip(".") or "not enough memory"
    return _ERRORS.get(code, BackendRunError)(f"{doing}: {reason}{advice}")
