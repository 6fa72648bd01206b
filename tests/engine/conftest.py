"""Engines for the tests: on PyTorch, with no graph in between, and the demo engine behind the command."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_machine as machine
import numpy as np
import pytest
import torch
import transformers

import bertrt_export
from bertrt.architecture import BertArchitecture
from bertrt.backends.base import BatchOutput, TokenBatch, Wanted, check_request
from bertrt.cli import main
from bertrt.engine import Engine
from bertrt.errors import EngineClosedError
from bertrt.folder import EngineFolder
from bertrt.manifest import Heads
from bertrt.tokenization import WordPieceTokenizer


class TorchBackend:
    """The contract of `Backend`, fulfilled by transformers' BertForPreTraining in float32.

    It keeps every request, so that tests see what the runtime asked for.
    """

    name = "torch"
    threads = 2
    pads = True

    def __init__(
        self, model: transformers.BertForPreTraining, architecture: BertArchitecture, heads: Heads
    ) -> None:
        self._model = model
        self._architecture = architecture
        self._heads = heads
        self._lock = threading.Lock()
        self.requests: list[tuple[TokenBatch, Wanted]] = []
        self.closed = 0

    @torch.inference_mode()
    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        if self.closed:
            raise EngineClosedError("closed")
        check_request(batch, wanted, self._architecture, self._heads)
        with self._lock:
            self.requests.append((batch, wanted))
        longest = int(batch.lengths.max())
        real = torch.arange(longest)[None, :] < torch.from_numpy(batch.lengths)[:, None]
        ids = torch.zeros(real.shape, dtype=torch.int64)
        segments = torch.zeros_like(ids)
        ids[real] = torch.from_numpy(batch.input_ids).long()
        segments[real] = torch.from_numpy(batch.token_type_ids).long()
        bert = self._model.bert(ids, attention_mask=real.long(), token_type_ids=segments)
        packed = bert.last_hidden_state[real]
        answers: dict[str, np.ndarray[Any, Any]] = {}
        if wanted.hidden_states:
            answers["hidden_states"] = packed.numpy()
        if wanted.pooled:
            answers["pooled"] = bert.pooler_output.numpy()
        if wanted.nsp:
            answers["nsp_logits"] = self._model.cls.seq_relationship(bert.pooler_output).numpy()
        if wanted.mlm_positions is not None:
            logits = self._model.cls.predictions(packed[torch.from_numpy(wanted.mlm_positions)])
            log_probs = logits.log_softmax(dim=-1)
            if wanted.mlm_top_k:
                values, ids = log_probs.sort(dim=-1, descending=True, stable=True)
                answers["mlm_top_ids"] = ids[:, : wanted.mlm_top_k].numpy()
                answers["mlm_top_log_probs"] = values[:, : wanted.mlm_top_k].numpy()
            if wanted.mlm_candidates is not None:
                candidates = torch.from_numpy(wanted.mlm_candidates)
                answers["mlm_candidate_log_probs"] = log_probs.gather(1, candidates).numpy()
        return BatchOutput(**answers)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return Path(bertrt_export.__file__).parent / "demo"


@pytest.fixture(scope="session")
def prose(demo_checkpoint: Path) -> list[str]:
    """Paragraphs of held-out prose."""
    lines = (demo_checkpoint / "evaluation.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="session")
def reference_model(demo_checkpoint: Path) -> transformers.BertForPreTraining:
    return transformers.BertForPreTraining.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference_tokenizer(demo_checkpoint: Path) -> transformers.BertTokenizerFast:
    return transformers.BertTokenizerFast.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="session")
def tokenizer(demo_checkpoint: Path) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_folder(demo_checkpoint)


@pytest.fixture(scope="session")
def architecture(demo_checkpoint: Path) -> BertArchitecture:
    config = json.loads((demo_checkpoint / "config.json").read_text(encoding="utf-8"))
    return BertArchitecture.from_config(config)


@pytest.fixture
def make_engine(
    reference_model: transformers.BertForPreTraining,
    tokenizer: WordPieceTokenizer,
    architecture: BertArchitecture,
) -> Callable[..., Engine]:
    """A function that makes an engine on PyTorch: ``make_engine(positions=32, heads=..., token_budget=...)``."""

    def make(
        *,
        heads: Heads = Heads(mlm=True, nsp=True, pooler=True),  # noqa: B008 - frozen
        positions: int = architecture.max_position_embeddings,
        **options: Any,
    ) -> Engine:
        sizes = BertArchitecture(**{**architecture.to_json(), "max_position_embeddings": positions})
        backend = TorchBackend(reference_model, sizes, heads)
        return Engine(backend=backend, tokenizer=tokenizer, architecture=sizes, heads=heads, **options)

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture(params=["torch", "native", "onnxruntime"])
def any_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The demo engine on PyTorch, and as it is exported and loaded by each backend that there is."""
    if request.param == "torch":
        yield request.getfixturevalue("make_engine")()
        return
    if request.param == "native":
        pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    with Engine.load(request.getfixturevalue("demo_engine")(), backend=request.param, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def engine_folder(demo_engine: Callable[..., Path]) -> Path:
    """The demo engine in float32; do not change it."""
    return demo_engine("fp32")


@pytest.fixture(scope="module")
def loaded(engine_folder: Path) -> Iterator[Engine]:
    with Engine.load(engine_folder) as engine:
        yield engine


@pytest.fixture
def copied(engine_folder: Path, tmp_path: Path) -> Path:
    """A copy of the engine folder, to be spoilt."""
    return Path(shutil.copytree(engine_folder, tmp_path / "copied"))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A module in the place of ``bertrt._native``, whose engine computes nothing and keeps what it was asked.

    It believes the manifest beside a weight file, but for what ``architecture`` says otherwise.
    """
    module = ModuleType("bertrt._native")

    class Error(Exception):
        def __init__(self, message: str, code: str) -> None:
            super().__init__(message)
            self.code = code

    class FakeEngine:
        def __init__(self, path: str, threads: int, pin: bool, verify: bool, huge: bool) -> None:
            self.opened = {
                "path": path,
                "threads": threads,
                "pin": pin,
                "verify": verify,
                "huge": huge,
            }
            if module.fails_to_load:
                raise module.fails_to_load
            self.threads, self.isa = threads, module.active_isa()
            value = json.loads((Path(path).parent / "engine.json").read_text(encoding="utf-8"))
            value["architecture"]["layer_norm_eps"] = float(
                np.float32(value["architecture"]["layer_norm_eps"])
            )
            self.architecture = {
                **value["architecture"],
                **value["heads"],
                "precision": value["precision"],
                **module.architecture,
            }
            module.engines.append(self)

        def run(self, *arrays: Any, **options: Any) -> dict[str, Any]:
            module.runs.append((arrays, options))
            if module.fails_to_run:
                raise module.fails_to_run
            return dict(module.answers)

    def active_isa() -> str:
        isa = os.environ.get("BERTRT_ISA") or "quick"
        if isa not in {"quick", "plain"}:
            raise Error(f"BERTRT_ISA={isa} cannot be used: the processor lacks it", "unsupported")
        return isa

    module.__file__ = str(tmp_path / "_native.so")
    for name, value in {
        "__version__": "1.2.3",
        "Error": Error,
        "Engine": FakeEngine,
        "active_isa": active_isa,
        "isa_status": lambda: [("huge", "the processor lacks it"), ("quick", ""), ("plain", "")],
        "architecture": {},
        "engines": [],
        "runs": [],
        "answers": {},
        "fails_to_load": None,
        "fails_to_run": None,
    }.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "bertrt._native", module)
    monkeypatch.delenv("BERTRT_ISA", raising=False)
    monkeypatch.delenv("BERTRT_PIN_THREADS", raising=False)
    monkeypatch.delenv("BERTRT_HUGE_PAGES", raising=False)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with GPUs that compute on the CPU (``fakes/``), and that notices what CUDA forbids."""
    fake = machine.install(monkeypatch)
    yield fake
    assert fake.violations == []


@pytest.fixture(scope="session")
def fake_plans(
    gpu_engine: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., EngineFolder]:
    """A function that gives the demo engine in float32 with plans for those GPUs; do not change it."""
    made: dict[Any, EngineFolder] = {}

    def make(library: str = "tensorrt", *, profiles: tuple[str, ...], most_mlm_rows: int) -> EngineFolder:
        key = library, profiles, most_mlm_rows
        if key not in made:
            out = tmp_path_factory.mktemp("plans") / "engine"
            made[key] = machine.fake_plans.build_plans(
                gpu_engine("fp32"), out, profiles, library=library, most_mlm_rows=most_mlm_rows
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported(gpu_engine: Callable[[str], Path]) -> Callable[[str], EngineFolder]:
    """A function that opens the demo engine for GPUs, without plans, in a precision; do not change the folder."""
    return lambda precision: EngineFolder.open(gpu_engine(precision))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an installation with BERTRT_KERNELS=OFF."""
    monkeypatch.setitem(sys.modules, "bertrt._native", None)


@pytest.fixture
def ask(
    engine_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """A function that runs a command on the engine and gives its standard output."""

    def ask(
        command: str,
        *arguments: str,
        code: int = 0,
        error: str = "",
        standard_input: bytes = b"",
        engine: Path = engine_folder,
    ) -> str:
        stream = io.TextIOWrapper(io.BytesIO(standard_input), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stream)
        assert main([command, str(engine), *arguments]) == code
        captured = capsys.readouterr()
        if error:
            assert re.fullmatch(rf"bertrt: error: {error}.*\n", captured.err), captured.err
        else:
            assert captured.err == ""
        return captured.out

    return ask
