"""The arguments that name an engine and say how it runs; the same for every command that loads one."""

from __future__ import annotations

import argparse

from bertrt.backends.placement import PROVIDERS
from bertrt.backends.registry import backend_names
from bertrt.cli.console import note
from bertrt.engine import Engine


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine and the options of `Engine.load`."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine folder, or 'demo' for the built-in one")
    # Not `choices`: the registry's error says more, and is the same in Python.
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"what computes: {' or '.join(backend_names())} (default: the first that works here)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number,
        metavar="N",
        help="threads of one run (default: the processors that this process may use)",
    )
    parser.add_argument(
        "--provider",
        choices=PROVIDERS,
        help="ONNX Runtime's execution provider (default: the best that works here)",
    )
    parser.add_argument(
        "--devices",
        type=device_list,
        metavar="N[,N]",
        help="GPUs by number, with commas between: one worker each (default: the first)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the files with their SHA-256 before loading"
    )


def open_engine(args: argparse.Namespace) -> Engine:
    """Load the engine that the arguments of `add_engine_arguments` name; use it as a context manager.

    Raises:
        BertRTError: as `Engine.load`.
    """
    engine = Engine.load(
        args.engine,
        backend=args.backend,
        threads=args.threads,
        verify=not args.no_verify,
        provider=args.provider,
        devices=args.devices,
    )
    if engine.latency_only:
        note(f"the weights of {args.engine!r} are random: its speed means something, its answers do not")
    return engine


def whole_number(text: str) -> int:
    """A whole number of at least 1, for ``type=`` of an argument."""
    value = int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def device_list(text: str) -> tuple[int, ...]:
    """GPUs such as ``0,1``, for ``type=`` of an argument."""
    return tuple(natural_number(part.strip()) for part in text.split(","))


def natural_number(text: str) -> int:
    """A whole number of at least 0, for ``type=`` of an argument."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


# Enough for every option, and few enough for the 64-bit integers beneath.
_MOST_DIGITS = 9
