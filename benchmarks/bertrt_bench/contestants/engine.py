"""The engine itself, timed at the backend: token ids in, arrays out, no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Backend, Wanted
from bertrt.backends.registry import backend_status, create_backend
from bertrt.errors import MeasurementError
from bertrt.folder import EngineFolder
from bertrt_bench.cases import TOP_K, Question
from bertrt_bench.contestants.base import Answer, Run, Setup

_Array = TypeVar("_Array", bound=npt.NDArray[Any])


class EngineContestant:
    """A backend on an engine folder."""

    def __init__(self, backend: Backend, versions: Mapping[str, str]) -> None:
        self._backend = backend
        self.versions = versions
        self.details: Mapping[str, str] = {"backend": backend.name}

    def prepare(self, question: Question) -> Run:
        """Choose what the backend shall compute; the heads that the task does not need are left out."""
        backend, tokens = self._backend, question.tokens
        task = question.case.task
        if task == "features":
            states = Wanted(hidden_states=True)
            return lambda: {"hidden_states": _there(backend.run(tokens, states).hidden_states)}
        if task == "next-sentence":
            pairs = Wanted(nsp=True)
            return lambda: {"logits": _there(backend.run(tokens, pairs).nsp_logits)}
        if task == "mlm-all":
            everywhere = Wanted(mlm_positions=np.arange(tokens.num_tokens, dtype=np.int64), mlm_logits=True)
            return lambda: {"logits": _there(backend.run(tokens, everywhere).mlm_logits)}
        masks = Wanted(mlm_positions=question.masks, mlm_top_k=TOP_K)

        def fill_mask() -> Answer:
            output = backend.run(tokens, masks)
            return {"ids": _there(output.mlm_top_ids), "log_probs": _there(output.mlm_top_log_probs)}

        return fill_mask


def open_engine(setup: Setup) -> EngineContestant:
    """Load the engine; the caller has checked the folder's hashes."""
    backend = create_backend(setup.backend, EngineFolder.open(setup.engine, verify=False), setup.threads)
    if backend.threads != setup.threads:
        raise MeasurementError(
            f"backend {backend.name!r} runs with {backend.threads} threads instead of {setup.threads}; "
            f"measure with --threads {backend.threads}"
        )
    versions = {
        status.name: status.version
        for status in backend_status()
        if status.name == backend.name and status.version
    }
    return EngineContestant(backend, versions)


def _there(output: _Array | None) -> _Array:
    if output is None:
        raise MeasurementError("the backend left out what was asked for; this is a defect of the backend")
    return output
