"""The engine itself, timed at the backend: token ids in, arrays out, no tokenizer; but for the text task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Backend, Wanted
from bertrt.backends.native import NAME as NATIVE
from bertrt.backends.native import load_kernels, pins_threads, takes_huge_pages
from bertrt.backends.registry import backend_status, create_backend
from bertrt.batching import DEFAULT_TOKEN_BUDGET
from bertrt.engine import Engine
from bertrt.errors import MeasurementError
from bertrt.folder import EngineFolder
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import TOP_K, Question, Task
from bertrt_bench.contestants.base import Answer, Run, Setup, check_threads
from bertrt_bench.contestants.parts import Assembled, Part, cut

# Those with products of bfloat16.
_BF16_SETS: Final = frozenset({"amx", "avx512-bf16"})

_Array = TypeVar("_Array", bound=npt.NDArray[Any])


class EngineContestant:
    """A backend on an engine folder."""

    def __init__(self, backend: Backend, folder: EngineFolder, versions: Mapping[str, str]) -> None:
        self._backend = backend
        self._folder = folder
        self.versions = versions
        self.threads = backend.threads
        isa = getattr(backend, "isa", None)
        self.details: Mapping[str, str] = {
            "backend": backend.name,
            **({"instruction_set": isa} if isinstance(isa, str) else {}),
            # What no rival is given is told.
            **(_switches() if backend.name == NATIVE else {}),
        }

    def prepare(self, question: Question) -> Run:
        """Choose what the backend shall compute; the heads that the task does not need are left out."""
        case = question.case
        if case.task == "fill-mask-text":
            return self._fill_mask_text(question)
        # A backend that never pads takes a mix whole; the runtime cuts it for one that does.
        budget = DEFAULT_TOKEN_BUDGET if self._backend.pads else None
        parts = cut(question, token_budget=budget)
        runs = [self._run(part, case.task) for part in parts]
        if len(runs) == 1 and np.array_equal(parts[0].sequences, np.arange(case.batch)):
            return runs[0]
        rows = [part.rows(case.task) for part in parts]
        size = sum(map(len, rows))
        return lambda: Assembled([(own, run(), None) for own, run in zip(rows, runs, strict=True)], size)

    def peak(self) -> float | None:
        """Operations per second that one core reaches at best in the engine's precision.

        ``None`` for a backend that is not our own, and in float32 where the kernels' peak of floating point is that of
        bfloat16.
        """
        if self._backend.name != NATIVE:
            return None
        if self._folder.manifest.precision == "fp32" and self.details.get("instruction_set") in _BF16_SETS:
            return None
        kind = "int8" if self._folder.manifest.precision == "int8" else "float"
        return float(load_kernels().peak(kind))

    def _run(self, part: Part, task: Task) -> Run:
        backend, tokens = self._backend, part.tokens
        if task == "features":
            states = Wanted(hidden_states=True)
            return lambda: {"hidden_states": _there(backend.run(tokens, states).hidden_states)}
        if task == "next-sentence":
            pairs = Wanted(nsp=True)
            return lambda: {"logits": _there(backend.run(tokens, pairs).nsp_logits)}
        if task == "mlm-all":
            everywhere = Wanted(mlm_positions=np.arange(tokens.num_tokens, dtype=np.int64), mlm_logits=True)
            return lambda: {"logits": _there(backend.run(tokens, everywhere).mlm_logits)}
        masks = Wanted(mlm_positions=part.positions, mlm_top_k=TOP_K)

        def fill_mask() -> Answer:
            output = backend.run(tokens, masks)
            return {"ids": _there(output.mlm_top_ids), "log_probs": _there(output.mlm_top_log_probs)}

        return fill_mask

    def _fill_mask_text(self, question: Question) -> Run:
        manifest = self._folder.manifest
        engine = Engine(
            backend=self._backend,
            tokenizer=WordPieceTokenizer.from_folder(self._folder.path, manifest.files),
            architecture=manifest.architecture,
            heads=manifest.heads,
        )
        texts = list(question.texts)

        def fill_mask() -> Answer:
            # One mask in each text, so that each answer is one list.
            answers: Any = engine.fill_mask(texts, top_k=TOP_K)
            scores = np.array([[found["score"] for found in answer] for answer in answers], np.float32)
            ids = np.array([[found["token"] for found in answer] for answer in answers], np.int64)
            return {"ids": ids, "log_probs": np.log(scores)}

        return fill_mask


def open_engine(setup: Setup) -> EngineContestant:
    """Load the engine; the caller has checked the folder's hashes."""
    folder = EngineFolder.open(setup.engine, verify=False)
    backend = create_backend(setup.backend, folder, setup.threads)
    check_threads(f"backend {backend.name!r}", backend.threads, setup.threads)
    versions = {
        status.name: status.version
        for status in backend_status()
        if status.name == backend.name and status.version
    }
    return EngineContestant(backend, folder, versions)


def _switches() -> dict[str, str]:
    return {
        "threads bound to processors": "yes" if pins_threads() else "no",
        "weights in huge pages": "yes" if takes_huge_pages() else "no",
    }


def _there(output: _Array | None) -> _Array:
    if output is None:
        raise MeasurementError("the backend left out what was asked for; this is a defect of the backend")
    return output
