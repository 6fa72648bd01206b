"""What takes part in a benchmark: how it is named, and what it does in its own process."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from bertrt.errors import MeasurementError
from bertrt.manifest import Precision
from bertrt_bench.cases import Question

# Arrays by name. `features`: hidden_states [tokens, hidden]. `mlm-all`: logits [tokens, vocab].
# `next-sentence`: logits [batch, 2]. `fill-mask` and `fill-mask-text`: ids [batch, TOP_K] int64 and log_probs
# [batch, TOP_K], best first; a rival adds all_log_probs [batch, vocab], which it has computed anyway, to check
# the engine's choice against. Floating-point arrays are float32.
Answer = Mapping[str, npt.NDArray[Any]]

# Computes the whole answer, from token ids in NumPy arrays (or from texts) to the answer in NumPy arrays. This
# is what is timed.
Run = Callable[[], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a contestant is told when its process starts.

    Attributes:
        engine: path of the engine folder.
        threads: threads that one run may use.
        backend: the engine's backend, ``None`` for its default.
        reference: path of the Hugging Face folder with the engine's weights; set if a contestant needs it.
        precision: of the contestant's arithmetic, see `ContestantKind.precision_beside`.
    """

    engine: str
    threads: int
    backend: str | None = None
    reference: str | None = None
    precision: Precision = "fp32"

    def to_json(self) -> dict[str, str | int | None]:
        """The fields by name."""
        return asdict(self)


class Contestant(Protocol):
    """Runs in the worker process; what it writes to standard output goes to standard error."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages that do its work."""
        ...

    @property
    def threads(self) -> int | None:
        """Threads that its library says it runs with; ``None`` until that is known."""
        ...

    @property
    def details(self) -> Mapping[str, str]:
        """What else decides its speed: backend, instruction set, kind of attention; `prepare` may add to it."""
        ...

    def prepare(self, question: Question) -> Run:
        """Do all that need not be repeated, and return what is timed."""
        ...


Factory = Callable[[Setup], Contestant]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestantKind:
    """An entry of the registry.

    Attributes:
        name: what the user writes after ``--against``.
        description: one line for the report.
        factory: ``module:function`` of type `Factory`, imported in the worker process only.
        modules: top-level modules that must be installed.
        install: the command that installs them.
        precisions: which precision it has beside an engine of each; float32 where none is named.
        needs_reference: it reads the weights from a Hugging Face folder.
    """

    name: str
    description: str
    factory: str
    modules: tuple[str, ...] = ()
    install: str = ""
    precisions: Mapping[Precision, Precision] = field(default_factory=dict)
    needs_reference: bool = False

    def precision_beside(self, engine: Precision) -> Precision:
        """Its precision beside an engine of this one; the coarser of the two sets the tolerance of the check."""
        return self.precisions.get(engine, "fp32")

    def check_installed(self) -> None:
        """Look for its modules, without importing them.

        Raises:
            MeasurementError: one is missing; names the command that installs it.
        """
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if missing:
            raise MeasurementError(
                f"cannot measure {self.name!r}: {' and '.join(missing)} not installed; "
                f"install with: {self.install}"
            )


def check_threads(name: str, found: int, asked: int) -> None:
    """See whether a library took as many threads as it was told to.

    Raises:
        MeasurementError: it did not; beside the others, which do, its times would say nothing.
    """
    if found != asked:
        raise MeasurementError(
            f"{name} runs with {found} threads instead of {asked}; measure with --threads {found}"
        )


def load_factory(name: str) -> Factory:
    """Import ``module:function``.

    Raises:
        MeasurementError: there is no such function.
    """
    module, _, function = name.partition(":")
    factory = getattr(importlib.import_module(module), function, None)
    if not callable(factory):
        raise MeasurementError(f"there is no contestant {name!r}: expected 'module:function'")
    return factory  # type: ignore[no-any-return]  # found by name; the worker checks what it returns
