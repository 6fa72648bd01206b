"""What the latency suite measures with: engines of the demo checkpoint, and PyTorch beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt.manifest import Precision
from bertrt_bench.agreement import Agreement
from bertrt_bench.arena import Arena
from bertrt_bench.cases import TASKS, Case
from bertrt_bench.measure import take_turns
from bertrt_bench.options import BenchOptions
from bertrt_bench.report import ContestantRecord
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

THREADS = min(2, usable_cpus())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case: how well the contestants agree, and the nanoseconds of each run by contestant and round."""

    agreement: Agreement
    times: dict[str, list[list[int]]]
    contestants: dict[str, ContestantRecord]


@dataclass(slots=True)
class Suite:
    """The contestants of one precision, started once; each case is measured once, when it is first asked for."""

    arena: Arena
    options: BenchOptions
    known: dict[Case, Measured] = field(default_factory=dict)

    def measure(self, case: Case) -> Measured:
        """Check the answers, then let the contestants run the case in turns."""
        if case not in self.known:
            (check,) = self.arena.check(case)
            times = take_turns(self.arena, [case], self.options)
            records = [ContestantRecord.of(process) for process in self.arena.contestants]
            self.known[case] = Measured(
                agreement=check.agreement,
                times={record.name: times[case, record.name] for record in records},
                contestants={record.name: record for record in records},
            )
        return self.known[case]


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Precision], Suite]]:
    """A function that gives the suite of a precision."""
    suites: dict[Precision, Suite] = {}
    with contextlib.ExitStack() as stack:

        def get(precision: Precision) -> Suite:
            if precision not in suites:
                path = tmp_path_factory.mktemp("engines") / f"demo-{precision}"
                with open_checkpoint("demo") as checkpoint:
                    export_engine(checkpoint, path, precision=precision)
                options = BenchOptions(
                    engine=str(path), tasks=TASKS, threads=THREADS, against=("torch",), seconds=0.5
                )
                arena = Arena(
                    EngineFolder.open(path), options.cases(), rivals=options.kinds(), threads=THREADS
                )
                suites[precision] = Suite(stack.enter_context(arena), options)
            return suites[precision]

        yield get
