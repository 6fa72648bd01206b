"""What a processor must reach, and the reason for each number.

**Beside OpenVINO, with AMX**: goals, set before a processor with AMX was at hand. Tiles multiply bytes eight times as
fast as vectors (in a cycle of a core TDPBSSD does 2,048 operations, two VPDPBUSD 256), so that both sides spend most
of their time between the products, where a fused engine has the least to do. 16 tokens fill one row of tiles and wait
for the weights, which are as many bytes for both: 1.8. At 128 tokens the tiles are full and the activations lie in
cache: 2.5. With 8 and more such sequences they leave it on our side too: 2.2. Real lengths are padded by a rival, and
not by us: 2.5. Products in bfloat16 are half as fast, and as much lies between them: 2.

**Beside PyTorch float32, with AMX**: 15, of the 32 times by which TDPBSSD exceeds two float32 FMAs (64 operations a
cycle).

**Of the peak, with AMX**: 30 %. With AVX-512 VNNI products at the peak's rate would take 77 % of the
time. Eight times as fast, with the rest as it was, they are 0.77 / 8 of 0.77 / 8 + 0.23.

**Fill-mask from a text**: its features, a tokeniser, and a head that reads 22 MB of decoder for one row, where the
encoder reads 85: below 1.15 times the features.

**Any processor**: who has an instruction set must not be better off without our kernels. AVX-512 VNNI is what ONNX
Runtime's int8 is made for: not slower. AVX2 has no product of bytes that cannot saturate, and spends several
instructions on one: not slower than the float32 that it replaces. AVX-VNNI has it: half as fast again.

**Drift**: the budgets of int8, and that of bf16 for the preferred tokens; `bertrt_export.drift.budgets` has their
reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bertrt_bench.cases import Task
from bertrt_bench.cpu.options import BASE
from bertrt_bench.cpu.plan import AMX, BF16, FEATURES, LARGE, LENGTHS, ONNXRUNTIME, OPENVINO, TEXT, TORCH
from bertrt_bench.cpu.record import Record, Taken
from bertrt_export.drift.budgets import write_limit
from bertrt_export.drift.figures import FIGURES

Figure = Literal["speedup", "share_of_peak", "over_features"]
TOP1: Final = "top1_agreement"
BF16_TOP1: Final = 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bound on one figure of one case.

    Attributes:
        step: whose record has it.
        shape: sequences and tokens; ``None``: the mix of lengths.
        limit: ``over_features`` must be below it, the others not.
        figure: that is bounded.
        rival: beside which, for ``speedup``.
        task: of the case.
        isa: the instruction set that it is for; elsewhere the figure informs only.
    """

    step: str
    shape: tuple[int, int] | None
    limit: float
    figure: Figure = "speedup"
    rival: str = ""
    task: Task = "features"
    isa: str = AMX

    @property
    def title(self) -> str:
        """What is bounded, for people."""
        shape = "real lengths" if self.shape is None else "{}x{}".format(*self.shape)
        precision = "bf16" if self.step == BF16 else "int8"
        what = {
            "speedup": f"against {self.rival}",
            "share_of_peak": "of the peak",
            "over_features": "over features",
        }[self.figure]
        isa = "" if self.isa == AMX else f" with {self.isa}"
        return f"{precision}{isa}, {self.task} at {shape}, {what}"

    @property
    def bound(self) -> str:
        """The limit, for people."""
        share = self.figure == "share_of_peak"
        limit = self.write(self.limit) if share else f"{self.limit:g}x"
        return f"{'below' if self.figure == 'over_features' else 'at least'} {limit}"

    def write(self, value: float) -> str:
        """A value for people."""
        return f"{100 * value:.0f} %" if self.figure == "share_of_peak" else f"{value:.2f}x"

    def meets(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value < self.limit if self.figure == "over_features" else value >= self.limit


BARS: Final = (
    Bar(step=FEATURES, shape=(1, 16), rival=OPENVINO, limit=1.8),
    Bar(step=FEATURES, shape=(1, 128), rival=OPENVINO, limit=2.5),
    Bar(step=FEATURES, shape=(8, 128), rival=OPENVINO, limit=2.2),
    Bar(step=LARGE, shape=(32, 128), rival=OPENVINO, limit=2.2),
    Bar(step=LENGTHS, shape=None, rival=OPENVINO, limit=2.5),
    Bar(step=BF16, shape=(1, 128), rival=OPENVINO, limit=2.0),
    Bar(step=BF16, shape=(32, 128), rival=OPENVINO, limit=2.0),
    Bar(step=LARGE, shape=(32, 128), rival=TORCH, limit=15.0),
    Bar(step=LARGE, shape=(32, 128), figure="share_of_peak", limit=0.3),
    Bar(step=TEXT, shape=(1, 128), figure="over_features", task="fill-mask-text", limit=1.15),
    Bar(step="int8-avx512-vnni", shape=(1, 128), rival=ONNXRUNTIME, limit=1.0, isa="avx512-vnni"),
    Bar(step="int8-avx512-vnni", shape=(8, 128), rival=ONNXRUNTIME, limit=1.0, isa="avx512-vnni"),
    Bar(step="int8-avx2-vnni", shape=(1, 128), rival=TORCH, limit=1.5, isa="avx2-vnni"),
    Bar(step="int8-avx2", shape=(1, 128), rival=TORCH, limit=1.0, isa="avx2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a bar.

    Attributes:
        title: what is bounded.
        bound: the limit.
        measured: the figure; empty if there is none.
        outcome: ``met``, ``missed (VALUE)``, why it does not apply, or ``not measured: REASON``.
        missed: whether it applies and was missed.
    """

    title: str
    bound: str
    measured: str
    outcome: str
    missed: bool = False


def judge(record: Record) -> list[Verdict]:
    """All the bars, those of drift last."""
    found = [_speed(bar, record) for bar in BARS]
    found += [_drift(step.name, record) for step in record.plan if step.kind == "drift"]
    return found


def _speed(bar: Bar, record: Record) -> Verdict:
    # Where it is the best instruction set, the first step is the one that measures it.
    name = FEATURES if bar.isa != AMX and bar.isa == record.abilities.best else bar.step
    taken = record.done(name)
    if taken is None:
        return _unmeasured(bar.title, bar.bound, record.why_not(name))
    value = _figure(bar, taken.value)
    if value is None:
        return _unmeasured(bar.title, bar.bound, _missing(bar, taken))
    measured, isa = bar.write(value), _instruction_set(taken.value)
    missed = False
    if record.options.model != BASE:
        outcome = f"for {BASE}"
    elif isa != bar.isa:
        outcome = "for processors with AMX" if bar.isa == AMX else f"for {bar.isa}"
    else:
        missed = not bar.meets(value)
        outcome = f"missed ({measured})" if missed else "met"
    return Verdict(title=bar.title, bound=bar.bound, measured=measured, outcome=outcome, missed=missed)


def _drift(name: str, record: Record) -> Verdict:
    _, precision, isa = name.split("-", 2)
    title = f"drift of {precision} with {isa}"
    bound = "within its budgets" if precision == "int8" else f"top-1 {write_limit(TOP1, BF16_TOP1)}"
    taken = record.done(name)
    if taken is None:
        return _unmeasured(title, bound, record.why_not(name))
    top1 = taken.value["figures"].get(TOP1)
    measured = f"top-1 {FIGURES[TOP1].write(top1)}"
    if precision == "int8":
        missed, value = not taken.value["passed"], "; ".join(violations(taken.value))
    else:
        missed, value = top1 is None or top1 < BF16_TOP1, measured
    outcome = f"missed ({value})" if missed else "met"
    return Verdict(title=title, bound=bound, measured=measured, outcome=outcome, missed=missed)


def violations(value: Mapping[str, Any]) -> list[str]:
    """The figures of a drift record that are over their budgets, a sentence each."""
    return [str(violation["message"]) for violation in value["violations"]]


def _unmeasured(title: str, bound: str, reason: str) -> Verdict:
    return Verdict(title=title, bound=bound, measured="", outcome=f"not measured: {reason}")


def _figure(bar: Bar, value: Mapping[str, Any]) -> float | None:
    for case in value["cases"]:
        shape = None if case["mix"] else (case["batch"], case["sequence"])
        if (case["task"], shape) != (bar.task, bar.shape):
            continue
        if bar.figure == "share_of_peak":
            share: float | None = case["share_of_peak"]
            return share
        compared = (
            case["over_features"]
            if bar.figure == "over_features"
            else case["comparisons"].get(bar.rival, {}).get("speedup")
        )
        return None if compared is None else float(compared["median"])
    return None


def _missing(bar: Bar, taken: Taken) -> str:
    return dict(taken.step.left_out).get(bar.rival, f"{taken.step.name} has no such figure")


def _instruction_set(value: Mapping[str, Any]) -> str | None:
    found: str | None = value["contestants"][0]["details"].get("instruction_set")
    return found
