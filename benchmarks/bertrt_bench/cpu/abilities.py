"""What can be measured on this machine, and why not the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bertrt.backends.native import ISA_VARIABLE, InstructionSet, instruction_sets
from bertrt.errors import InputError, MeasurementError
from bertrt_bench.contestants import RIVALS, ContestantKind

# The first import of a large package from a slow disk takes long, but not so long.
_IMPORT_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What there is.

    Attributes:
        sets: the instruction sets that there are kernels for, best first.
        rivals: by name, why a rival cannot take part; an empty string if it can.
    """

    sets: Sequence[InstructionSet]
    rivals: Mapping[str, str]

    @property
    def best(self) -> str:
        """The instruction set that is taken unless another is asked for; ``portable`` always can be."""
        return next(isa.name for isa in self.sets if not isa.reason)

    def isa_problem(self, name: str) -> str:
        """Why an instruction set cannot be used; an empty string if it can."""
        known = {isa.name: isa.reason for isa in self.sets}
        return known.get(name, "there are no kernels for it")


def look() -> Abilities:
    """Find out what there is.

    Raises:
        InputError: ``BERTRT_ISA`` is set.
        BackendUnavailableError: the kernels are not built, or do not load.
    """
    if os.environ.get(ISA_VARIABLE):
        raise InputError(
            f"{ISA_VARIABLE} is set, but a run takes every instruction set in its turn; unset it"
        )
    return Abilities(
        sets=instruction_sets(), rivals={name: _rival_problem(kind) for name, kind in RIVALS.items()}
    )


def _rival_problem(kind: ContestantKind) -> str:
    try:
        kind.check_installed()
    except MeasurementError as error:
        return str(error)
    # In a process of its own: some of these packages start threads, and a broken one may end the process.
    program = f"import {', '.join(kind.modules)}"
    try:
        done = subprocess.run(  # noqa: S603 - module names of our own registry
            [sys.executable, "-P", "-X", "utf8", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{' and '.join(kind.modules)} did not load within {_IMPORT_SECONDS:.0f} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    return f"{' and '.join(kind.modules)} do not load ({last}); install again with: {kind.install}"
