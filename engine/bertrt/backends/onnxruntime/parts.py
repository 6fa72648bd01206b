"""Engines in parts on ONNX Runtime: a session for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import onnxruntime

from bertrt.backends.base import Float32, Int32, Int64
from bertrt.backends.onnxruntime.sessions import run_session
from bertrt.backends.padded import BlockLimits
from bertrt.backends.parts import ENCODER, MLM, POOLER, Array

# Rows of logits at a time: 256 over 30,522 WordPieces are 31 MB.
_MLM_ROWS: Final = 256


class SessionParts:
    """Parts on the CPU, where nothing is gained by fixed shapes: a `bertrt.backends.parts.PartsExecutor`."""

    limits = BlockLimits(small=256)
    mlm_rows = _MLM_ROWS

    def __init__(self, sessions: Mapping[str, onnxruntime.InferenceSession]) -> None:
        self._sessions = sessions

    @contextmanager
    def encode(self, feeds: Mapping[str, Int32]) -> Iterator[_Encoded]:
        """See `bertrt.backends.parts.PartsExecutor.encode`."""
        sequences, tokens = feeds["input_ids"].shape
        found = run_session(self._sessions[ENCODER], ["hidden_states"], feeds, (sequences, tokens))
        yield _Encoded(self._sessions, found["hidden_states"])

    def close(self) -> None:
        """Nothing: whoever runs still has the sessions."""


class _Encoded:
    def __init__(self, sessions: Mapping[str, onnxruntime.InferenceSession], states: Float32) -> None:
        self._sessions = sessions
        self._states = states

    def hidden_states(self) -> Float32:
        return self._states

    def mlm(self, positions: Int64, candidates: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        return self._head(MLM, outputs, mlm_positions=positions, mlm_candidates=candidates)

    def pooler(self, rows: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        return self._head(POOLER, outputs, pooled_rows=rows)

    def _head(self, part: str, outputs: Sequence[str], **feeds: Int64) -> dict[str, Array]:
        sequences, tokens, width = self._states.shape
        rows = self._states.reshape(-1, width)
        return run_session(
            self._sessions[part], outputs, {"hidden_states": rows, **feeds}, (sequences, tokens)
        )
