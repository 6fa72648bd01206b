"""ONNX Runtime and OpenVINO as rivals, on the demo model: they convert it, and answer as PyTorch does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from bertrt.errors import MeasurementError
from bertrt.folder import EngineFolder
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench import agreement
from bertrt_bench.cases import TASKS, Case, Question, SpecialIds, make_question
from bertrt_bench.contestants import ENGINE, RIVALS, Setup
from bertrt_bench.contestants.engine import EngineContestant
from bertrt_bench.contestants.onnxruntime import join_projections
from bertrt_bench.contestants.openvino import check_precision, import_openvino, open_openvino
from bertrt_bench.contestants.pytorch import open_torch
from bertrt_bench.gpu.rivals import open_sdpa
from bertrt_bench.measure import measure
from bertrt_bench.options import BenchOptions
from bertrt_bench.patience import StepTimeout
from bertrt_bench.process import ContestantProcess
from bertrt_bench.texts import make_text_question
from bertrt_export.demo import demo_folder

THREADS = 1
TEXT = """It was late, and the lamp had burned low.

"Who is there?" said the old man.

No

Nobody answered him; he heard only the wind in the chimney, the rain upon the windows and, far away, the sea.
"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_the_rivals_agree_with_the_engine(demo_engine, book: Path, precision: str) -> None:
    options = BenchOptions(
        engine=str(demo_engine(precision)),
        tasks=TASKS,
        batches=(3,),
        sequences=(24,),
        lengths_from=str(book),
        threads=THREADS,
        backend="onnxruntime",
        against=("torch", "onnxruntime", "openvino"),
        warmup=0,
        repeats=1,
    )
    report = measure(options)
    assert len(report.results) == 2 * len(TASKS)
    for result in report.results:
        for rival, comparison in result.comparisons.items():
            found = comparison.agreement
            assert found.tolerance == agreement.TOLERANCES[precision]
            if precision == "fp32":
                # A hundred roundings of 6e-8 in a row; OpenVINO's own exponential and GELU are polynomials.
                assert found.error < 1e-4, (rival, result.case)
    _, pytorch, onnxruntime, openvino = report.contestants
    # As each library says.
    assert [record.threads for record in report.contestants] == [THREADS] * 4
    assert pytorch.details["dtype"] == "float32"
    assert onnxruntime.details["precision"] == precision
    assert openvino.details["precision"].startswith("f32" if precision == "fp32" else "int8, the rest f32")
    assert set(onnxruntime.versions) == {"onnxruntime"}
    assert set(openvino.versions) == {"openvino"}


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("fp32", {"torch": "fp32", "onnxruntime": "fp32", "openvino": "fp32", "engine": "fp32"}),
        ("fp16", {"torch": "fp32", "onnxruntime": "fp32", "openvino": "fp32", "engine": "fp16"}),
        ("bf16", {"torch": "fp32", "onnxruntime": "fp32", "openvino": "bf16", "engine": "bf16"}),
        ("int8", {"torch": "fp32", "onnxruntime": "int8", "openvino": "int8", "engine": "int8"}),
    ],
)
def test_rivals_take_the_engines_precision_where_they_have_it(engine: str, expected: dict[str, str]) -> None:
    assert {kind.name: kind.precision_beside(engine) for kind in (ENGINE, *RIVALS.values())} == expected


def question(engine: Path, case: Case) -> Question:
    tokenizer = WordPieceTokenizer.from_folder(engine)
    if case.task == "fill-mask-text":
        return make_text_question(case, tokenizer)
    architecture = EngineFolder.open(engine).manifest.architecture
    return make_question(case, special=SpecialIds.of(tokenizer), vocab_size=architecture.vocab_size)


@pytest.fixture
def ask(demo_engine, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """A function that has a rival answer one case."""

    def answer(name: str, case: Case, precision: str, asked: Question) -> dict[str, np.ndarray]:
        scratch, folder = tmp_path / f"{name}-{precision}", tmp_path / "question"
        scratch.mkdir()
        folder.mkdir(exist_ok=True)
        asked.save(folder)
        setup = Setup(
            engine=str(demo_engine()), threads=THREADS, reference=str(demo_folder()), precision=precision
        )
        with ContestantProcess(RIVALS[name], setup, scratch, patience=StepTimeout(300)) as process:
            process.prepare(0, case, folder)
            return dict(process.answer(0, case, rows=10_000))

    return answer


@pytest.mark.parametrize(
    ("rival", "precision"), [("openvino", "bf16"), ("openvino", "int8"), ("onnxruntime", "int8")]
)
def test_a_lower_precision_is_one(demo_engine, ask, rival: str, precision: str) -> None:
    if precision == "bf16":
        capable = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capable:
            pytest.skip("OpenVINO has no bf16 on this processor")
    case = Case.mix("features", [40, 9, 128])
    asked = question(demo_engine(), case)
    exact, coarse = ask("torch", case, "fp32", asked), ask(rival, case, precision, asked)
    found = agreement.compare(case, precision, coarse, exact)
    # Far above float32's noise, or the hint or the quantisation went unheard.
    assert 1e-3 < found.error < found.tolerance


@pytest.mark.parametrize("found", [2, 1])
def test_openvino_takes_hyper_threads_or_says_that_it_does_not(
    demo_engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    """On a machine with one core of two threads, made up, as not every machine has hyper-threads."""
    asked: dict[str, object] = {}

    class Compiled:
        def get_property(self, name: str) -> object:
            return {"INFERENCE_NUM_THREADS": found, "INFERENCE_PRECISION_HINT": openvino.Type.f32}[name]

        def create_infer_request(self) -> None:
            return None

    class Core:
        def read_model(self, _path: Path) -> object:
            return SimpleNamespace(reshape=lambda shapes: None)

        def compile_model(self, _model: object, _device: str, options: dict[str, object]) -> Compiled:
            asked.update(options)
            return Compiled()

        def get_property(self, _device: str, _name: str) -> list[str]:
            return []

    openvino = import_openvino()
    monkeypatch.setattr(openvino, "Core", Core)
    monkeypatch.setattr("bertrt_bench.contestants.openvino.convert", lambda *_: None)
    contestant = open_openvino(Setup(engine=str(demo_engine()), threads=2, reference="none"))
    assert contestant.threads is None
    case = question(demo_engine(), Case(task="features", batch=1, sequence=8))
    if found == 2:
        contestant.prepare(case)
    else:
        with pytest.raises(
            MeasurementError, match="OpenVINO runs with 1 threads instead of 2; measure with --threads 1"
        ):
            contestant.prepare(case)
    assert asked["ENABLE_HYPER_THREADING"] is True
    assert (asked["INFERENCE_NUM_THREADS"], contestant.threads) == (2, found)


@pytest.mark.parametrize("rival", ["torch", "gpu"])
def test_pytorch_that_takes_other_threads_is_refused(
    demo_engine, monkeypatch: pytest.MonkeyPatch, rival: str
) -> None:
    # The number of threads of the tests' own process stays as it is.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda count: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    setup = Setup(engine=str(demo_engine()), threads=2, reference=str(demo_folder()), backend="cpu")
    with pytest.raises(MeasurementError, match="PyTorch runs with 3 threads instead of 2"):
        (open_torch if rival == "torch" else open_sdpa)(setup)


def test_a_precision_that_openvino_does_not_follow() -> None:
    openvino = import_openvino()

    class Compiled:
        def get_property(self, name: str) -> object:
            assert name == "INFERENCE_PRECISION_HINT"
            return openvino.Type.f32

    check_precision(Compiled(), "f32")
    with pytest.raises(MeasurementError, match="OpenVINO computes in f32 on this processor, not in bf16"):
        check_precision(Compiled(), "bf16")


@pytest.mark.parametrize("fault", ["segments", "positions", "padding", "layer"])
def test_a_wrong_model_is_told_from_quantisation(demo_engine, fault: str) -> None:
    case = Case(task="features", batch=4, sequence=64)
    tokens = question(demo_engine(), replace(case, task="next-sentence")).tokens
    ids, segments = (
        torch.from_numpy(values.reshape(4, 64)).long() for values in (tokens.input_ids, tokens.token_type_ids)
    )
    model = transformers.BertModel.from_pretrained(demo_folder(), add_pooling_layer=False).eval()
    with torch.inference_mode():
        right = model(ids, token_type_ids=segments).last_hidden_state
        if fault == "segments":
            wrong = model(ids).last_hidden_state
        elif fault == "padding":
            ids, segments = (torch.nn.functional.pad(values, (0, 64)) for values in (ids, segments))
            wrong = model(ids, token_type_ids=segments).last_hidden_state[:, :64]
        elif fault == "positions":
            positions = torch.arange(1, 65)[None]
            wrong = model(ids, token_type_ids=segments, position_ids=positions).last_hidden_state
        else:
            del model.encoder.layer[-1]
            wrong = model(ids, token_type_ids=segments).last_hidden_state
    ours, theirs = ({"hidden_states": states.reshape(256, -1).numpy()} for states in (wrong, right))
    found = agreement.compare(case, "int8", ours, theirs)
    assert found.error > found.tolerance


def test_openvino_and_nncf_send_nothing(demo_engine, tmp_path: Path) -> None:
    # What telemetry does, it does in threads, and no error of it would be seen.
    program = (
        "import json, socket, sys\n"
        "calls = []\n"
        "def refuse(*arguments, **options):\n"
        "    calls.append(arguments)\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from bertrt_bench.contestants.openvino import write_model\n"
        "write_model(**json.loads(sys.argv[1]))\n"
        "assert 'nncf' in sys.modules and 'openvino.tools.ovc' in sys.modules\n"
        "sent = [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
        "assert (calls, sent) == ([], []), (calls, sent)\n"
    )
    arguments = {
        "reference": str(demo_folder()),
        "engine": str(demo_engine()),
        "folder": str(tmp_path),
        "output": "last_hidden_state",
        "precision": "int8",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.xml").is_file()


def test_a_graph_without_attention_is_a_defect() -> None:
    import onnx

    with pytest.raises(MeasurementError, match="no attention to fuse"):
        join_projections(onnx.ModelProto())


def test_a_conversion_that_fails_says_so(demo_engine, tmp_path: Path) -> None:
    setup = Setup(
        engine=str(demo_engine()), threads=THREADS, reference=str(tmp_path / "absent"), precision="int8"
    )
    case = Case(task="features", batch=1, sequence=8)
    folder, scratch = tmp_path / "question", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    question(demo_engine(), case).save(folder)
    with (
        pytest.raises(MeasurementError, match="cannot convert the reference checkpoint") as caught,
        ContestantProcess(RIVALS["onnxruntime"], setup, scratch, patience=StepTimeout(300)) as process,
    ):
        process.prepare(0, case, folder)
    # The message, which is all that is shown, has the cause.
    assert re.search(
        r"write_model ended with exit code 1 \(its last line: .*there is no checkpoint folder .*absent.*\)$",
        str(caught.value),
    )


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_rivals_need_a_reference(demo_engine, tmp_path: Path, name: str) -> None:
    setup = Setup(engine=str(demo_engine()), threads=THREADS)
    with pytest.raises(MeasurementError, match=f"the {name} contestant needs a reference checkpoint"):
        ContestantProcess(RIVALS[name], setup, tmp_path, patience=StepTimeout(300)).__enter__()


def test_the_engines_instruction_set_is_in_its_details(demo_engine) -> None:
    class Backend:
        name, threads, pads = "abacus", 1, False

    folder = EngineFolder.open(demo_engine())
    assert EngineContestant(Backend(), folder, {}).details == {"backend": "abacus"}
    Backend.isa = "beads"
    contestant = EngineContestant(Backend(), folder, {})
    assert contestant.details == {"backend": "abacus", "instruction_set": "beads"}
    assert contestant.peak() is None


@pytest.mark.parametrize(
    ("isa", "precision", "kind"),
    [
        ("amx", "int8", "int8"),
        ("amx", "bf16", "float"),
        # Its peak of floating point is that of bfloat16.
        ("amx", "fp32", None),
        ("avx512-bf16", "fp32", None),
        ("avx512-vnni", "fp32", "float"),
    ],
)
def test_a_share_is_taken_of_a_peak_in_the_same_precision(
    monkeypatch: pytest.MonkeyPatch, isa: str, precision: str, kind: str | None
) -> None:
    peaks = {"int8": 4e12, "float": 2e12}
    kernels = SimpleNamespace(peak=peaks.__getitem__)
    monkeypatch.setattr("bertrt_bench.contestants.engine.load_kernels", lambda: kernels)
    backend = SimpleNamespace(name="native", threads=1, pads=False, isa=isa)
    folder = SimpleNamespace(manifest=SimpleNamespace(precision=precision))
    assert EngineContestant(backend, folder, {}).peak() == (None if kind is None else peaks[kind])


@pytest.mark.parametrize(
    ("variable", "detail"),
    [("PIN_THREADS", "threads bound to processors"), ("HUGE_PAGES", "weights in huge pages")],
)
def test_the_engines_switches_are_in_its_details(
    demo_engine, monkeypatch: pytest.MonkeyPatch, variable: str, detail: str
) -> None:
    class Backend:
        name, threads, pads, isa = "native", 1, False, "beads"

    for name in ("BERTRT_PIN_THREADS", "BERTRT_HUGE_PAGES"):
        monkeypatch.delenv(name, raising=False)
    folder = EngineFolder.open(demo_engine())
    found = EngineContestant(Backend(), folder, {}).details
    assert (found["threads bound to processors"], found["weights in huge pages"]) == ("no", "no")
    monkeypatch.setenv(f"BERTRT_{variable}", "1")
    assert EngineContestant(Backend(), folder, {}).details == {**found, detail: "yes"}
