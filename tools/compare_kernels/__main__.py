"""Whether a change of the native kernels is faster, and whether it changes their answers.

Run from the root of the repository: ``python -m tools.compare_kernels ENGINE VARIANT...`` (see tools/README.md).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bertrt import machine
from bertrt.errors import BertRTError, InputError

from .comparison import compare
from .library import Library, build
from .variants import Variant, write_sources

_EXAMPLE = """\
what has been changed since the last commit, on one sequence of 128 tokens:
  python -m tools.compare_kernels engine HEAD .
constants of the working tree at other values, on three shapes:
  python -m tools.compare_kernels engine . .:kSoloRows=384 .:kSoloRows=128 --shape 1x128,8x128,32x128
"""
_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_SHAPE: Final = re.compile(r"(\d+)x(\d+)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="compare_kernels",
        description="Build the native kernels several times and time them in turn, in one process: the encoder, "
        "token ids in, hidden states out. BERTRT_ISA chooses the instruction set of all.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", help="an engine folder with weights of the native backend")
    parser.add_argument(
        "variants",
        nargs="+",
        metavar="VARIANT",
        help="a revision of git, or '.' for the working tree; behind a colon the constants that shall have other "
        "values, NAME=VALUE or STRUCT::NAME=VALUE, with commas between them. The first is what the others are "
        "compared with",
    )
    parser.add_argument(
        "--shape", default="1x16,1x128", help="BATCHxTOKENS, with commas between them (default %(default)s)"
    )
    parser.add_argument("--threads", default="2", help="numbers of threads (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each shape, all builds together (default %(default)g)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=_REPOSITORY / "build" / "compare",
        help="folder of the builds, which stay there",
    )
    parser.add_argument("--json", action="store_true", help="write the figures as JSON to standard output")
    return parser


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build and compare; a row for each shape, number of threads, and variant.

    Raises:
        BertRTError: a variant, shape or engine will not do, or a build failed.
        OSError: the folder cannot be written, or CMake is not there.
    """
    variants = [Variant.parse(text) for text in options.variants]
    if len({variant.folder for variant in variants}) != len(variants):
        raise InputError("two variants are the same; a build can be compared with another one only")
    shapes = _shapes(options.shape)
    threads = _threads(options.threads)
    paths = []
    for variant in variants:
        _say(f"building {variant.name}")
        folder = options.work / variant.folder
        write_sources(variant, _REPOSITORY, folder / "sources")
        paths.append(build(folder / "sources", folder / "build"))
    rows: list[dict[str, Any]] = []
    for count in threads:
        libraries = [Library(path, options.engine, count) for path in paths]
        try:
            for batch, sequence in shapes:
                if sequence > libraries[0].longest:
                    raise InputError(f"{sequence} tokens are too long for this model: {libraries[0].longest}")
                figures = compare(libraries, batch, sequence, seconds=options.seconds)
                for variant, library, figure in zip(variants, libraries, figures, strict=True):
                    shape = {"shape": f"{batch}x{sequence}", "threads": count, "isa": library.isa}
                    rows.append({"variant": variant.name, **shape, **asdict(figure)})
                    _say(_line(rows[-1]))
        finally:
            for library in libraries:
                library.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when done, 1 if a build failed, 2 for bad input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        rows = run(options)
    except InputError as error:
        print(f"compare_kernels: error: {error}", file=sys.stderr)
        return 2
    except (BertRTError, OSError) as error:
        print(f"compare_kernels: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare_kernels: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"processor": machine.describe().cpu, "engine": options.engine, "figures": rows}))
    return 0


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        found = _SHAPE.fullmatch(part)
        if found is None or int(found[1]) < 1 or int(found[2]) < 1:
            raise InputError(f"shape {part!r} is not BATCHxTOKENS, such as 8x128")
        shapes.append((int(found[1]), int(found[2])))
    return shapes


def _threads(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise InputError(f"--threads {text!r} is not a positive number, or several with commas between them")
    return [int(count) for count in counts]


def _line(row: dict[str, Any]) -> str:
    same = "same bits" if row["difference"] == 0 else f"off by {row['difference']:.1e}"
    return (
        f"{row['shape']:>7}  {row['threads']} threads  {row['isa']:<11}  {row['median_ms']:9.3f} ms  "
        f"tenth {row['tenth_ms']:9.3f}  ratio {row['ratio']:.3f}  {row['runs']:4} runs  {same:<15}  {row['variant']}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
