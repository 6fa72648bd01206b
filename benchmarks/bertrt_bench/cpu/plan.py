"""What is measured, in which order, and with which command; and what a machine cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from bertrt.backends.native import ISA_VARIABLE
from bertrt.errors import InputError
from bertrt.manifest import Precision
from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.options import DEMO, CpuOptions, Model

Kind = Literal["bench", "drift"]

AMX: Final = "amx"
TORCH: Final = "torch"
ONNXRUNTIME: Final = "onnxruntime"
OPENVINO: Final = "openvino"

FEATURES: Final = "int8-features"
LARGE: Final = "int8-32x128"
LENGTHS: Final = "int8-lengths"
TEXT: Final = "int8-text"
BF16: Final = "bf16"

# Each beside the rival that runs where nothing better is: whoever has it must gain by our kernels too.
_OTHER_SETS: Final = (
    ("avx512-bf16", "1,8", ONNXRUNTIME),
    ("avx512-vnni", "1,8", ONNXRUNTIME),
    ("avx2-vnni", "1", TORCH),
    ("avx2", "1", TORCH),
)
# All but portable, which is as fast as a compiler makes it: nobody who has another would choose it.
_DRIFT_SETS: Final = (AMX, *(name for name, _, _ in _OTHER_SETS))
DRIFT_PRECISIONS: Final[tuple[Precision, ...]] = ("int8", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineExport:
    """An engine that is measured.

    Attributes:
        model: whose shape it has; the demo's with its weights, any other with random ones.
        precision: of its products.
    """

    model: Model
    precision: Precision

    @property
    def name(self) -> str:
        """Of its folder, within the run's."""
        return f"{self.model}-{self.precision}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of ``bertrt``."""
        random = () if self.model == DEMO else ("--random",)
        precision = ("--precision", self.precision)
        return ("export", self.model, self.name, *random, *precision, "--backend", "native")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measurement, which is one record.

    Attributes:
        name: of the record.
        kind: the subcommand.
        engine: that is measured.
        options: of the subcommand.
        rivals: that take part.
        left_out: rivals that should have, by name, and why they cannot.
        isa: the instruction set that is asked for; ``None``: the best.
        problem: why it cannot be taken; an empty string if it can.
    """

    name: str
    kind: Kind
    engine: EngineExport
    options: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    isa: str | None = None
    problem: str = ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of ``bertrt``; what it answers on standard output is the record."""
        against = ("--against", ",".join(self.rivals)) if self.rivals else ()
        answer = ("--json", "-") if self.kind == "bench" else ("--json", "--no-save")
        return (self.kind, self.engine.name, *self.options, *against, *answer)

    @property
    def command(self) -> str:
        """As it would be typed."""
        return command_line(self.arguments, self.isa)


def command_line(arguments: Sequence[str], isa: str | None = None) -> str:
    """A command of ``bertrt`` as it would be typed."""
    return " ".join([*([f"{ISA_VARIABLE}={isa}"] if isa else []), "bertrt", *arguments])


def planned(options: CpuOptions, abilities: Abilities, *, lengths: str) -> list[Step]:
    """All the steps of a run, in order, those that this machine cannot take too.

    Args:
        options: what is asked.
        abilities: of the machine.
        lengths: the file's name in the run's folder whose paragraphs are the mix.
    """
    int8 = EngineExport(model=options.model, precision="int8")
    threads = ("--threads", str(options.thread_count))
    timed = ("--seconds", f"{options.seconds:g}")

    def bench(name: str, engine: EngineExport, *rest: str, against: Sequence[str] = ()) -> Step:
        problems = {rival: abilities.rivals.get(rival, "not known") for rival in against}
        return Step(
            name=name,
            kind="bench",
            engine=engine,
            options=(*threads, *rest),
            rivals=tuple(rival for rival, problem in problems.items() if not problem),
            left_out=tuple((rival, problem) for rival, problem in problems.items() if problem),
        )

    everyone = (TORCH, ONNXRUNTIME, OPENVINO)
    shape = ("--batch", "1", "--sequence", "128")
    steps = [
        bench(FEATURES, int8, "--batch", "1,8", "--sequence", "16,128", *timed, against=everyone),
        bench(LARGE, int8, "--batch", "32", "--sequence", "128", "--repeats", "5", against=everyone),
        bench(
            LENGTHS,
            int8,
            *("--lengths-from", lengths, "--repeats", "3", "--rounds", "3", "--warmup", "1"),
            # PyTorch would take longest of all, and pads as the others do.
            against=(ONNXRUNTIME, OPENVINO),
        ),
        bench(TEXT, int8, *shape, "--task", "features,fill-mask-text", *timed),
        bench(
            BF16,
            EngineExport(model=options.model, precision="bf16"),
            *("--batch", "1,32", "--sequence", "128", *timed),
            against=(OPENVINO,),
        ),
    ]
    for isa, batches, rival in _OTHER_SETS:
        step = bench(f"int8-{isa}", int8, "--batch", batches, "--sequence", "128", *timed, against=(rival,))
        problem = abilities.isa_problem(isa)
        if isa == abilities.best:
            problem = f"it is the best instruction set here, with which {FEATURES} was measured"
        steps.append(replace(step, isa=isa, problem=problem))
    for precision in DRIFT_PRECISIONS:
        for isa in _DRIFT_SETS:
            problem = abilities.isa_problem(isa) or abilities.rivals.get(TORCH, "")
            step = Step(
                name=f"drift-{precision}-{isa}",
                kind="drift",
                engine=EngineExport(model=DEMO, precision=precision),
                options=threads,
                isa=isa,
                problem=problem,
            )
            steps.append(step)
    return steps


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps whose names hold one of the words; all without any.

    Raises:
        InputError: there is none.
    """
    found = [step for step in steps if not only or any(word in step.name for word in only)]
    if not found:
        names = ", ".join(step.name for step in steps)
        raise InputError(f"no step's name holds {' or '.join(only)}; there are {names}")
    return found
