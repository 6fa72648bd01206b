"""How a run of minutes ends when it is asked to."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final, NoReturn

# What shells give to a program that ended by a signal: 128 and the signal's number.
ENDED_BY_SIGNAL: Final = 128


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let a polite request to end unwind the stack, so that the record is kept and every process ended on the way."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(ENDED_BY_SIGNAL + number)

    # One that is ignored stays so: under nohup the run goes on when the terminal is gone.
    replaced = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
