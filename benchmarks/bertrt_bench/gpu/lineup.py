"""Who takes part, what each needs, and the steps of a run in the order of their value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from bertrt.manifest import Precision
from bertrt_bench.contestants import ContestantKind
from bertrt_bench.gpu.options import DEFAULT_MINUTES

_RIVALS: Final = "bertrt_bench.gpu.rivals"
_ENGINE: Final = "bertrt_bench.gpu.engines:open_engine"
# Names of what a contestant needs, as `bertrt_bench.gpu.jobs.probe` reports it.
TORCH: Final = "torch"
TRITON: Final = "triton"
ONNX: Final = "onnx"
ONNXRUNTIME: Final = "onnxruntime"
ORT_CUDA: Final = "onnxruntime with CUDA"
ORT_TENSORRT: Final = "onnxruntime with TensorRT"
TENSORRT: Final = "tensorrt"
# The first GPUs that compute in a type.
LEAST_CAPABILITY: Final[Mapping[Precision, tuple[int, int]]] = {"bf16": (8, 0), "fp8": (8, 9)}
# Of each step of a rehearsal, in which nothing is to be learned of time.
_REHEARSAL_SECONDS: Final = 240.0
# Others' times are given as multiples of theirs.
GPU_BASELINE: Final = "torch-sdpa-fp16"
REHEARSAL_BASELINE: Final = "torch-sdpa-fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One contestant.

    Attributes:
        name: in the record.
        description: one line.
        factory: ``module:function``, see `bertrt_bench.contestants.base.Factory`.
        precision: of its products.
        backend: what `bertrt_bench.contestants.base.Setup.backend` tells it: PyTorch's device, an engine's backend.
        needs: libraries.
        engine: it runs the engine folder of its precision.
        mixes: it runs sequences of unequal lengths.
    """

    name: str
    description: str
    factory: str
    precision: Precision
    backend: str
    needs: tuple[str, ...]
    engine: bool = False
    mixes: bool = True

    @property
    def kind(self) -> ContestantKind:
        """It, as `bertrt_bench.process.ContestantProcess` knows contestants."""
        return ContestantKind(name=self.name, description=self.description, factory=self.factory)


StepKind = Literal["engine", "contestant", "drift", "turns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a run.

    Attributes:
        kind: export an engine and build its plan; start a contestant, let it prepare the cases and check its answers;
            check an engine's drift; time all contestants that are there in turns.
        name: in the record.
        seconds: that it may take at most; in a lineup, of a run of the default minutes.
        precision: of ``engine`` and ``drift``.
        contender: of ``contestant``.
    """

    kind: StepKind
    name: str
    seconds: float
    precision: Precision | None = None
    contender: Contender | None = None


def sdpa(precision: Precision, device: str) -> Contender:
    """PyTorch with its fused attention."""
    return Contender(
        name=f"torch-sdpa-{precision}",
        description=f"PyTorch in {precision}, scaled_dot_product_attention, not compiled",
        factory=f"{_RIVALS}:open_sdpa",
        precision=precision,
        backend=device,
        needs=(TORCH,),
    )


def eager(precision: Precision, device: str) -> Contender:
    """PyTorch with the plain formula."""
    return Contender(
        name=f"torch-eager-{precision}",
        description=f"PyTorch in {precision}, plain attention, not compiled",
        factory=f"{_RIVALS}:open_eager",
        precision=precision,
        backend=device,
        needs=(TORCH,),
    )


def compiled(precision: Precision, device: str) -> Contender:
    """PyTorch, compiled."""
    return Contender(
        name=f"torch-compile-{precision}",
        description=f"PyTorch in {precision}, scaled_dot_product_attention, compiled for each shape (max-autotune)",
        factory=f"{_RIVALS}:open_compiled",
        precision=precision,
        backend=device,
        needs=(TORCH, TRITON) if device == "cuda" else (TORCH,),
        mixes=False,
    )


def tensorrt(precision: Precision) -> Contender:
    """Our plan."""
    return Contender(
        name=f"bertrt-tensorrt-{precision}",
        description=f"BertRT in {precision}, backend tensorrt",
        factory=_ENGINE,
        precision=precision,
        backend="tensorrt",
        needs=(TENSORRT,),
        engine=True,
    )


def onnxruntime(precision: Precision, provider: str) -> Contender:
    """Our graphs on ONNX Runtime."""
    return Contender(
        name=f"bertrt-onnxruntime-{provider}-{precision}",
        description=f"BertRT in {precision}, backend onnxruntime with the provider {provider}",
        factory=_ENGINE,
        precision=precision,
        backend=f"onnxruntime:{provider}",
        needs=({"cuda": ORT_CUDA, "tensorrt": ORT_TENSORRT, "cpu": ONNXRUNTIME}[provider],),
        engine=True,
    )


def gpu_steps() -> list[Step]:
    """On a GPU: what nobody should do without first.

    PyTorch in float32 comes first because its answers are those that all others are compared with. Whoever has been
    started stays, and takes its turn in every later round, so that each is timed beside the others.
    """
    device = "cuda"
    return [
        _enter(sdpa("fp32", device)),
        _enter(sdpa("fp16", device)),
        _engine("fp16"),
        _enter(tensorrt("fp16")),
        _enter(onnxruntime("fp16", "cuda")),
        _turns(1),
        _drift("fp16"),
        _enter(compiled("fp16", device), seconds=150),
        _enter(eager("fp16", device)),
        _engine("int8"),
        _enter(tensorrt("int8")),
        _drift("int8"),
        _turns(2),
        _engine("fp8"),
        _enter(tensorrt("fp8")),
        _drift("fp8"),
        _engine("bf16"),
        _enter(tensorrt("bf16")),
        _drift("bf16"),
        _enter(sdpa("bf16", device)),
        _enter(eager("bf16", device)),
        _turns(3),
        _enter(compiled("bf16", device), seconds=150),
        _enter(onnxruntime("fp16", "tensorrt"), seconds=120),
        _enter(onnxruntime("int8", "cuda")),
        _engine("fp32"),
        _enter(tensorrt("fp32")),
        _drift("fp32"),
        _enter(eager("fp32", device)),
        _turns(4),
    ]


def rehearsal_steps() -> list[Step]:
    """On a CPU: every kind of step, with what a CPU can run, however slow it is."""
    device = "cpu"
    steps = [
        _enter(sdpa("fp32", device)),
        _enter(eager("fp32", device)),
        _engine("fp32"),
        _enter(onnxruntime("fp32", device)),
        _turns(1),
        _drift("fp32"),
        _engine("int8"),
        _enter(onnxruntime("int8", device)),
        _drift("int8"),
        _enter(compiled("fp32", device)),
        _turns(2),
    ]
    return [replace(step, seconds=_REHEARSAL_SECONDS) for step in steps]


def chosen(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """The steps whose names hold one of the words, and the turns; all steps without words."""
    return [
        step
        for step in steps
        if not words or step.kind == "turns" or any(word in step.name for word in words)
    ]


def scaled(steps: Sequence[Step], minutes: float) -> list[Step]:
    """The steps, with limits that grow with the minutes of the run beyond its default.

    With fewer minutes they do not shrink: a step that is cut off has measured nothing.
    """
    factor = max(1.0, minutes / DEFAULT_MINUTES)
    return [replace(step, seconds=step.seconds * factor) for step in steps]


def _enter(contender: Contender, *, seconds: float = 60) -> Step:
    return Step(kind="contestant", name=contender.name, seconds=seconds, contender=contender)


def _engine(precision: Precision) -> Step:
    return Step(kind="engine", name=f"engine {precision}", seconds=180, precision=precision)


def _drift(precision: Precision) -> Step:
    return Step(kind="drift", name=f"drift {precision}", seconds=90, precision=precision)


def _turns(number: int) -> Step:
    return Step(kind="turns", name=f"turns {number}", seconds=60)
