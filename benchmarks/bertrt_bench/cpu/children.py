"""A command of ``bertrt`` in a process of its own, which ends with the run however that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bertrt.backends.native import ISA_VARIABLE

# How long a command that was told to end may take to end what it started.
_GRACE_SECONDS: Final = 10.0
# How much of a failed command's standard error is told.
_TAIL_BYTES: Final = 4096
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
        how = f"exit code {self.code}" if self.code >= 0 else f"ended by signal {-self.code}"
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
    with answer.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603 - this very product
            # -P: what lies in the current folder must not stand in for a module.
            [sys.executable, "-P", "-X", "utf8", "-m", "bertrt", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env=environment,
            # Ctrl-C at the terminal reaches the parent alone, which then ends its commands.
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            _end(process)
    return Ended(code=process.returncode, answer=answer.read_bytes(), errors=_tail(errors))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs: politely first, as it has processes of its own to end."""
    if process.returncode is not None:
        return
    try:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    finally:
        # Once it has been collected its number may belong to another.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(path: Path) -> str:
    lines = path.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "backslashreplace").splitlines()
    return " / ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])
