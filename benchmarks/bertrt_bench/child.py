"""A process of ours in a session of its own: started, waited for, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

# How much of a process's standard error is looked at when it has died.
_TAIL_BYTES: Final = 4096
# Between two looks at a process that still runs: short at first, as most end soon after they are waited for.
_FIRST_LOOK: Final = 0.001
_LAST_LOOK: Final = 0.05


class Child:
    """Runs a module of ours; a context manager that ends it.

    It leads a group of its own, which takes its number. A leader that has ended is not collected before `end`: until
    then no other process gets the number, so that what it has left running can always be reached by it.

    Args:
        module: what ``python -m`` runs.
        arguments: of it.
        environment: all its variables.
        errors: the file that its standard error goes to.
        stdin: a file, or `subprocess.PIPE`; by default it has none.
        stdout: the same; by default what it prints goes with its errors.
        cwd: the folder in which it runs.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str],
        errors: Path,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._errors = errors
        with errors.open("wb") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and modules of ours
                [*interpreter(module), *arguments],
                stdin=stdin,
                stdout=sink if stdout is None else stdout,
                stderr=sink,
                cwd=cwd,
                env=environment,
                # Ctrl-C at the terminal reaches the parent alone, which then ends its children.
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def stdin(self) -> IO[bytes]:
        """Its standard input, if that is a pipe."""
        return _pipe(self._process.stdin)

    @property
    def stdout(self) -> IO[bytes]:
        """Its standard output, if that is a pipe."""
        return _pipe(self._process.stdout)

    def wait(self, seconds: float) -> int | None:
        """Wait until it ends, or for so many seconds.

        Returns:
            Its exit code, negative if a signal ended it; ``None`` if it still runs.
        """
        deadline, pause = time.monotonic() + seconds, _FIRST_LOOK
        while (code := self._look(os.WNOHANG)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_LOOK)
        return code

    def join(self) -> int:
        """Wait until it ends, however long that takes, and return the exit code as `wait` does."""
        code = self._look(0)
        assert code is not None, "without WNOHANG there is an end"  # noqa: S101 - for the type checker
        return code

    def ask_to_end(self, seconds: float) -> None:
        """Ask it to end, politely, and give it so many seconds to end what it started in other sessions."""
        if self.wait(0) is None:
            os.kill(self._process.pid, signal.SIGTERM)
            self.wait(seconds)

    def end(self) -> None:
        """End it and all that it started in its session, and collect it; does nothing if that was done before."""
        process = self._process
        if process.returncode is None:
            # The descendants of a leader that has ended are killed with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            # A pipe that has lost its reader cannot be flushed.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def tail(self) -> str:
        """The end of its standard error."""
        with self._errors.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode("utf-8", "backslashreplace").strip()

    def obituary(self, code: int | None) -> str:
        """How it ended with this code (see `wait`), and the last line that it wrote: it may say why."""
        return obituary(code) + last_words(self.tail())

    def _look(self, options: int) -> int | None:
        if self._process.returncode is not None:
            return self._process.returncode
        # WNOWAIT: it stays a zombie.
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | options)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def interpreter(module: str) -> list[str]:
    """The command that runs a module of ours."""
    # -P: what lies in the current folder must not stand in for a module.
    return [sys.executable, "-P", "-X", "utf8", "-m", module]


def obituary(code: int | None) -> str:
    """How a process ended; ``None``: it has not."""
    if code is None:
        return "closed its output without ending"
    if code < 0:
        name = f"signal {-code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
        return f"was ended by {name}{'; the machine may have run out of memory' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


def last_words(errors: str) -> str:
    """The last line of a process's standard error, for the end of a message; empty if it wrote none."""
    lines = errors.strip().splitlines()
    return f" (its last line: {lines[-1].strip()})" if lines else ""


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without this pipe; start it with subprocess.PIPE")
    return pipe
