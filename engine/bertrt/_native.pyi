"""BERT on the CPU: the native kernels. Use it through bertrt.Engine."""

from typing import Any

import numpy
import numpy.typing


class Error(Exception):
    """
    What the kernels refuse or fail at. ``code`` says which: "invalid_argument", "not_found",
    "bad_file", "missing_head", "unsupported", "out_of_memory" or "system".
    """

    code: str = ''

class Engine:
    """A weight file opened for runs. May be used by many threads at once."""

    def __init__(self, path: str, threads: int = 0, pin: bool = False, verify: bool = True, huge: bool = False) -> None:
        """
        Open a weight file (not an engine folder). ``threads`` of each run; 0: the processors that the process may
        use. ``pin`` binds them to processors, ``verify`` compares the checksums of the weights, ``huge`` copies them into
        pages of 2 MB.
        """

    def run(self, input_ids: numpy.typing.NDArray[numpy.int32], token_type_ids: numpy.typing.NDArray[numpy.int32], offsets: numpy.typing.NDArray[numpy.int64], *, mlm_positions: numpy.typing.NDArray[numpy.int64] | None = None, mlm_logits: bool = False, top_k: int = 0, candidates: numpy.typing.NDArray[numpy.int64] | None = None, hidden_states: bool = False, pooled: bool = False, nsp: bool = False, layers: bool = False) -> dict[str, numpy.typing.NDArray[Any]]:
        """
        Compute what is asked for, on C-contiguous arrays: ``input_ids`` and ``token_type_ids`` ``[tokens]``,
        ``offsets`` ``[sequences + 1]``, ``mlm_positions`` ``[n]``, ``candidates`` ``[n, c]``.

        Returns:
            What was asked for, of ``mlm_logits`` ``[n, vocab]``, ``mlm_top_ids`` ``[n, k] int64``,
            ``mlm_top_log_probs`` ``[n, k]``, ``mlm_candidate_log_probs`` ``[n, c]``, ``hidden_states``
            ``[tokens, hidden]``, ``pooled`` ``[sequences, hidden]``, ``nsp_logits`` ``[sequences, 2]`` and ``layers``
            ``[layers + 1, tokens, hidden]``; float32 where nothing else is said.
        """

    @property
    def isa(self) -> str:
        """The instruction set in use."""

    @property
    def threads(self) -> int:
        """Threads of each run."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight file."""

    @property
    def architecture(self) -> dict[str, int | float | str | bool]:
        """Sizes and constants, by the names of the manifest."""

def isa_status() -> list[tuple[str, str]]:
    """
    Instruction sets, best first, each with why it cannot be used here, or an empty string.
    """

def active_isa() -> str:
    """
    The instruction set that an engine opened now would use.

    Raises:
        Error: BERTRT_ISA names none that can be used here.
    """

def peak(kind: str, isa: str | None = None, seconds: float = 0.2) -> float:
    """
    Operations per second of one core on registers, two for each multiply-add.

    ``kind`` is ``"int8"`` or ``"float"``; ``isa`` names an instruction set, by default the active one.
    """

__version__: str
