"""The ``bertrt`` command: finds the subcommand, runs it, and turns every failure into one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, NoReturn, Protocol

from bertrt import __version__
from bertrt.cli.command import EXIT_BAD_INPUT, EXIT_OK, Command
from bertrt.cli.console import printable
from bertrt.cli.extras import EXTRA_OF_MODULE, install_line
from bertrt.errors import BertRTError

__all__ = ["main"]

PROGRAM: Final = "bertrt"
ENTRY_POINT_GROUP: Final = "bertrt.commands"
TRACEBACK_VARIABLE: Final = "BERTRT_TRACEBACK"

# What shells give to a program that ended by a signal: 128 and the signal's number.
_ENDED_BY_SIGNAL: Final = 128
_EXIT_INTERRUPTED: Final = _ENDED_BY_SIGNAL + signal.SIGINT
_EXIT_BROKEN_PIPE: Final = _ENDED_BY_SIGNAL + 13  # SIGPIPE, which not every system has

_BUILT_IN: Final = {
    "info": "bertrt.cli.info",
    "fill-mask": "bertrt.cli.fill_mask",
    "next-sentence": "bertrt.cli.next_sentence",
    "features": "bertrt.cli.features",
    "doctor": "bertrt.cli.doctor",
}
# `bertrt --help` shows the commands without importing what they need, so their lines stand here.
_GROUPS: Final = {
    "make an engine": {
        "export": "turn a checkpoint into an engine folder",
        "build": "build the TensorRT plans of an engine",
        "info": "show what an engine folder holds",
    },
    "ask it": {
        "fill-mask": "the likeliest words for each [MASK] of a text",
        "next-sentence": "the probability that text B follows text A",
        "features": "vectors for texts",
    },
    "measure it": {
        "drift": "compare an engine with PyTorch float32 on real text",
        "bench": "measure an engine's speed, in turns with a rival",
    },
    "try it": {
        "demo": "export the demo model, ask it, measure its drift and its speed",
        "doctor": "what this machine has, and which backends can run",
    },
}
# What a command needs altogether; the others need the usual ones.
_EXTRAS_OF_COMMAND: Final = {"drift": ("export", "ort", "torch")}
_USUAL_EXTRAS: Final = ("export", "ort")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 bad input, 128 + n when signal n ended it.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _signals_raise() if argv is None else contextlib.nullcontext():
        try:
            try:
                code = _run(arguments)
            except SystemExit as ending:  # argparse after --help, and a signal
                code = ending.code if isinstance(ending.code, int) else EXIT_OK
            # Here and not at the interpreter's end, where a full disk could no longer be reported.
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail("interrupted", _EXIT_INTERRUPTED)
        except BrokenPipeError:
            _flush_or_abandon()
            return _EXIT_BROKEN_PIPE
        except BertRTError as error:
            return _fail(str(error))
        except OSError as error:
            return _fail(_describe(error))
        except MemoryError:
            return _fail("not enough memory; give shorter texts, or run where there is more")
        except Exception as error:
            return _fail(
                f"unexpected {type(error).__name__}: {error}; "
                f"this is a defect of {PROGRAM}: set {TRACEBACK_VARIABLE}=1 to see where it arose"
            )
    return code


def _run(arguments: list[str]) -> int:
    if sys.stdout is None:  # started with standard output closed: nobody wants to read
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - stays open
    if not arguments or arguments[0] in {"-h", "--help"}:
        stream = sys.stdout if arguments else sys.stderr
        stream.write(_overview())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] in {"-V", "--version"}:
        print(f"{PROGRAM} {__version__}")
        return EXIT_OK
    name, *rest = arguments
    command = _load(name)
    try:
        return command.run(_parse(command, rest))
    except ModuleNotFoundError as error:
        _name_extra(name, error)
        raise


def _load(name: str) -> Command:
    """Import the one module that holds a command.

    Raises:
        BertRTError: there is no such command, or what it needs is not installed.
    """
    if name in _BUILT_IN:
        found: Any = importlib.import_module(_BUILT_IN[name]).COMMAND
    else:
        point = _entry_points().get(name)
        if point is None:
            raise _unknown(name)
        try:
            found = point.load()
        except ModuleNotFoundError as error:
            _name_extra(name, error)
            raise
    if not isinstance(found, Command):
        raise BertRTError(f"the entry point of command {name!r} is not a bertrt command but {found!r}")
    return found


def _parse(command: Command, arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=f"{PROGRAM} {command.name}",
        description=f"{command.help[:1].upper()}{command.help[1:]}.",
        epilog="example:\n" + "\n".join(f"  {line}" for line in command.example.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    # A command with a --json of its own keeps it.
    with contextlib.suppress(argparse.ArgumentError):
        parser.add_argument("--json", action="store_true", help="write JSON, for machines")
    try:
        # Intermixed, because otherwise `fill-mask demo --top-k 3 TEXT` would not find the text.
        parsed, unknown = parser.parse_known_intermixed_args(arguments)
    except TypeError:  # argparse cannot do that for a command with subcommands of its own
        parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        # An option that is not known takes what follows it along.
        options = [argument for argument in unknown if argument.startswith("-")]
        parser.error(
            f"there is no option {options[0]!r}" if options else f"one argument too many: {unknown[0]!r}"
        )
    return parsed


class _Writable(Protocol):
    def write(self, text: str, /) -> object: ...


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are like all others: one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BertRTError(f"{message}; see '{self.prog} --help'")

    def print_help(self, file: _Writable | None = None) -> None:
        # argparse's own keeps silent when the output cannot be written.
        (file or sys.stdout).write(self.format_help())


def _overview() -> str:
    """What ``bertrt --help`` shows."""
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Optimised inference engines for BERT: export a checkpoint, run it, and know how far it drifts.",
    ]
    others = sorted(set(_entry_points()).difference(*_GROUPS.values()))
    groups = {**_GROUPS, "other": dict.fromkeys(others, "added by another package")}
    for title, commands in groups.items():
        if commands:
            lines += ["", f"{title}:", *(f"  {name:<14} {text}" for name, text in commands.items())]
    lines += [
        "",
        f"{PROGRAM} COMMAND --help shows the arguments of a command, {PROGRAM} --version the version.",
        "",
        "example:",
        '  bertrt fill-mask demo "He opened the [MASK] and went into the house."',
        "",
        "exit codes: 0 done, 1 a check failed, 2 bad input",
    ]
    return "\n".join(lines) + "\n"


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _unknown(name: str) -> BertRTError:
    known = [command for commands in _GROUPS.values() for command in commands]
    if name in known:
        return BertRTError(
            f"the command {name!r} is not installed here; install the distribution: pip install {PROGRAM}"
        )
    import difflib  # only a mistake needs it

    close = difflib.get_close_matches(name, [*known, *_entry_points()], n=1)
    meant = f"did you mean '{close[0]}'?" if close else f"see '{PROGRAM} --help'"
    kind = "option" if name.startswith("-") else "command"
    return BertRTError(f"there is no {kind} {name!r}; {meant}")


def _name_extra(command: str, error: ModuleNotFoundError) -> None:
    """Say which extra of the distribution brings a module that was not found, if one does.

    Raises:
        BertRTError: with the line that installs it.
    """
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(module)
    if extra is not None:
        extras = (*_EXTRAS_OF_COMMAND.get(command, _USUAL_EXTRAS), extra)
        raise BertRTError(
            f"'{PROGRAM} {command}' needs {module}, which is not installed; run: {install_line(extras)}"
        ) from error


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    place = f" ({error.filename})" if error.filename else ""
    advice = {
        errno.ENOSPC: "; make room, or write to another disk",
        errno.EDQUOT: "; make room, or write to another disk",
        errno.EROFS: "; choose a place that can be written",
        errno.EACCES: "; choose a place that you may use",
    }.get(error.errno or 0, "")
    return f"{reason}{place}{advice}"


def _fail(message: str, code: int = EXIT_BAD_INPUT) -> int:
    """Write the one line of an error; with ``BERTRT_TRACEBACK=1`` let the traceback go first."""
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in {"", "0"}:
        import traceback

        traceback.print_exc()
    _flush_or_abandon()
    line = printable(" ".join(message.split()))
    with contextlib.suppress(OSError, AttributeError, ValueError):  # nowhere to say it
        sys.stderr.write(f"{PROGRAM}: error: {line}\n")
        sys.stderr.flush()
    return code


def _flush_or_abandon() -> None:
    """Write what was already answered; if that fails, it must not fail again at the interpreter's end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let a polite request to end unwind the stack, so that half-written files are removed on the way."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(_ENDED_BY_SIGNAL + number)

    replaced = []
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # A signal that is ignored stays so (nohup), and only the main thread may set a handler.
        with contextlib.suppress(ValueError):
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
