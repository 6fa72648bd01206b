"""A command of ``bertrt`` in a process of its own, which ends with the run however that ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bertrt.backends.native import ISA_VARIABLE
from bertrt_bench.child import Child, obituary

# How long a command that was told to end may take to end what it started.
_GRACE_SECONDS: Final = 10.0
# Of a failed command's standard error, the last lines are told.
_TAIL_LINES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a command.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        answer: its standard output.
        errors: the last lines of its standard error, as one.
    """

    code: int
    answer: bytes
    errors: str

    @property
    def obituary(self) -> str:
        """How it failed, in a line."""
        how = obituary(self.code)
        return f"{how}: {self.errors}" if self.errors else how


def run_bertrt(arguments: Sequence[str], *, folder: Path, isa: str | None = None) -> Ended:
    """Run a command to its end.

    Args:
        arguments: of ``bertrt``.
        folder: in which it runs, and which gets its temporary files; removed with the run.
        isa: the instruction set that it is told to use.
    """
    environment = {**os.environ, "TMPDIR": str(folder)}
    if isa is not None:
        environment[ISA_VARIABLE] = isa
    answer, errors = folder / "stdout", folder / "stderr"
    with (
        answer.open("wb") as stdout,
        Child(
            "bertrt", *arguments, environment=environment, errors=errors, stdout=stdout, cwd=folder
        ) as command,
    ):
        try:
            code = command.join()
        finally:
            # It has processes of its own to end, in sessions of their own.
            command.ask_to_end(_GRACE_SECONDS)
    return Ended(code=code, answer=answer.read_bytes(), errors=_told(command.tail()))


def _told(errors: str) -> str:
    return " / ".join([line.strip() for line in errors.splitlines() if line.strip()][-_TAIL_LINES:])
