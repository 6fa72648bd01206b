"""What a subcommand is: a name, its arguments, and a function that runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

EXIT_OK: Final = 0
EXIT_CHECK_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand of ``bertrt``.

    A distribution adds one with an entry point of the group ``bertrt.commands``: the entry point's name is
    the subcommand's, its value an object of this class.

    Attributes:
        name: what the user types.
        help: one line, as in ``bertrt --help``.
        example: shown at the end of ``bertrt NAME --help``; one command a line.
        add_arguments: adds the command's own arguments; ``--json`` is added for it unless it does so itself.
        run: does the work and returns the exit code: `EXIT_OK`, `EXIT_CHECK_FAILED` or `EXIT_BAD_INPUT`. It
            raises what `bertrt.errors` holds; the caller turns that into one line and an exit code.
    """

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
