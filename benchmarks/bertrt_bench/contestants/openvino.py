"""OpenVINO on the CPU: int8 by NNCF, bfloat16 by hint.

The model is converted from an ONNX graph of standard operators, which gives what a conversion from PyTorch gives.
Where all the sequences of a question have one length it is compiled for just that shape.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.errors import MeasurementError
from bertrt.manifest import Precision
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import RANKED, Question, SpecialIds
from bertrt_bench.contestants.base import Run, Setup, check_threads
from bertrt_bench.contestants.conversion import INPUTS, OUTPUTS, convert, write_float32
from bertrt_bench.contestants.parts import (
    Block,
    Forward,
    best_tokens,
    fastest_budget,
    measure_budgets,
    padded_run,
    told_of,
)

# What the ranges of static quantisation are measured on: short sequences reach other values than long ones.
_CALIBRATION_LENGTHS: Final = (8, 16, 32, 64, 128, 256) * 4


class OpenVinoContestant:
    """A model file for each kind of task, compiled for each question."""

    def __init__(self, setup: Setup, reference: str) -> None:
        self._setup = setup
        self._reference = reference
        self._openvino: Any = import_openvino()
        self._core = self._openvino.Core()
        self._folder = Path(tempfile.mkdtemp())
        self._tokenizer = WordPieceTokenizer.from_folder(Path(setup.engine))
        self.threads: int | None = None
        self.versions: Mapping[str, str] = {"openvino": str(self._openvino.get_version())}
        self._floats = self._float_precisions()
        rest = " or ".join(self._floats)
        self.details: dict[str, str] = {
            "precision": f"int8, the rest {rest}" if setup.precision == "int8" else rest
        }

    def prepare(self, question: Question) -> Run:
        """Convert the model if this is the first question of its kind, and compile it."""
        path = self._model(OUTPUTS[question.case.task])
        if len(self._floats) == 1:
            forward = self._compiled(path, question, self._floats[0])
            budget = fastest_budget(question, forward)
        else:
            tried = []
            for precision in self._floats:
                forward = self._compiled(path, question, precision)
                for budget, rate in measure_budgets(question, forward).items():
                    tried.append((rate, budget, precision, forward))
            _, budget, precision, forward = max(tried, key=lambda one: one[0])
            self.details[f"rest of {question.case}"] = precision
        self.details.update(told_of(question, budget))
        return padded_run(question, forward, token_budget=budget, rank=best_tokens, tokenizer=self._tokenizer)

    def _compiled(self, path: Path, question: Question, precision: str) -> Forward:
        case = question.case
        model = self._core.read_model(path)
        if case.lengths is None:
            model.reshape({name: [case.batch, case.sequence] for name in INPUTS})
        options = {
            "INFERENCE_NUM_THREADS": self._setup.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # By this hint alone it would leave a core's second hyper-thread idle, which all others use.
            "ENABLE_HYPER_THREADING": True,
            "INFERENCE_PRECISION_HINT": precision,
        }
        compiled = self._core.compile_model(model, "CPU", options)
        check_precision(compiled, precision)
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        check_threads("OpenVINO", self.threads, self._setup.threads)
        request = compiled.create_infer_request()
        # The next block's run would write over the output.
        keep = case.lengths is not None and case.task not in RANKED

        def forward(block: Block) -> npt.NDArray[Any]:
            request.infer(block.feeds(), share_inputs=True)
            output: npt.NDArray[Any] = request.get_output_tensor(0).data
            return output.copy() if keep else output

        return forward

    def _float_precisions(self) -> tuple[str, ...]:
        if self._setup.precision == "bf16":
            return ("bf16",)
        # Of an int8 model the attention and the norms stay in floating point. Left to itself OpenVINO takes
        # bfloat16 wherever the processor has instructions for it, faster or not; here both are tried.
        capable = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("f32", "bf16") if self._setup.precision == "int8" and capable else ("f32",)

    def _model(self, output: str) -> Path:
        folder = self._folder / output
        if not folder.exists():
            folder.mkdir()
            arguments = {
                "reference": self._reference,
                "engine": self._setup.engine,
                "folder": str(folder),
                "output": output,
                "precision": self._setup.precision,
            }
            convert(f"{__name__}:write_model", arguments)
        return folder / "model.xml"


def open_openvino(setup: Setup) -> OpenVinoContestant:
    """Make the contestant."""
    if setup.reference is None:
        raise MeasurementError("the openvino contestant needs a reference checkpoint")
    return OpenVinoContestant(setup, setup.reference)


def check_precision(compiled: Any, precision: str) -> None:
    """See whether a compiled model computes as the hint says: one that the processor cannot follow is dropped silently.

    Raises:
        MeasurementError: it does not.
    """
    found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if found != precision:
        raise MeasurementError(
            f"OpenVINO computes in {found} on this processor, not in {precision}; "
            "leave it out (--against), or measure an engine of another precision"
        )


def import_openvino() -> ModuleType:
    """Import it without its telemetry, which would report each import and conversion over the network.

    It does without where the package that sends is not installed, and so does NNCF.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the documented way to make imports fail
    import openvino

    return openvino  # type: ignore[no-any-return]  # its types are skipped


def write_model(reference: str, engine: str, folder: str, output: str, precision: Precision) -> None:
    """Write ``model.xml`` into a folder."""
    openvino: Any = import_openvino()
    model = openvino.convert_model(write_float32(reference, Path(folder), output, "onnx"))
    if precision == "int8":
        import nncf

        samples = _calibration(engine)
        model = nncf.quantize(
            model,
            nncf.Dataset(samples),
            # Activations asymmetric where it pays; its preset for latency alone was no faster.
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
    openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)


def _calibration(engine: str) -> list[dict[str, npt.NDArray[np.int64]]]:
    """Sequences like those of the questions, but none of them."""
    from bertrt.folder import EngineFolder

    architecture = EngineFolder.open(engine, verify=False).manifest.architecture
    special = SpecialIds.of(WordPieceTokenizer.from_folder(Path(engine)))
    ordinary = special.ordinary(architecture.vocab_size)
    random = np.random.default_rng(0x5EED)
    samples = []
    for number, length in enumerate(_CALIBRATION_LENGTHS):
        ids = random.choice(ordinary, size=min(length, architecture.max_position_embeddings)).astype(np.int64)
        ids[0], ids[-1] = special.cls, special.sep
        segments = np.zeros_like(ids)
        if number % 2:
            ids[ids.size // 2] = special.sep
            segments[ids.size // 2 + 1 :] = min(1, architecture.type_vocab_size - 1)
        else:
            ids[random.integers(1, ids.size - 1)] = special.mask
        values = zip(INPUTS, (ids, np.ones_like(ids), segments), strict=True)
        samples.append({name: value[None] for name, value in values})
    return samples
