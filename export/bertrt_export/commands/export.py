"""``bertrt export``: a checkpoint becomes an engine folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, note
from bertrt.errors import InputError
from bertrt.folder import EngineFolder
from bertrt.manifest import Dialect, Precision, Target
from bertrt_export.calibration import DEFAULT_TOKENS, METHODS, Calibration, calibrate, default_text
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.exporter import check_request, export_engine, needs_calibration
from bertrt_export.targets import NAMES, TARGETS, target_problem


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="'demo' (embedded), a local Hugging Face folder, or the name of a checkpoint on the hub; "
        "with --random the name of an architecture",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the engine folder to make")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="int8",
        help="of the matrix products: int8 (default) is the fastest on a CPU, fp32 the nearest to PyTorch; on CPUs "
        "bf16 is the native backend's alone, fp16 onnxruntime's; fp8 is for GPUs",
    )
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        default="cpu",
        help="cpu (default), or tensorrt: graphs in parts, every value with its type, for TensorRT ('bertrt build' "
        "makes plans of them) and for ONNX Runtime on a GPU",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="UTF-8 from your field, a text a line, from which the scales of the activations are found: for int8 and "
        "fp8 with --target tensorrt (default: a public-domain novel)",
    )
    parser.add_argument(
        "--calibrate-tokens",
        type=int,
        metavar="N",
        help=f"the most tokens of a text that calibration runs at once (default {DEFAULT_TOKENS}): positions "
        "beyond are not seen, so give as many as your texts have",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how a scale is found from the activations (default: the one that drifts least, by precision)",
    )
    parser.add_argument(
        "--backend",
        metavar="NAMES",
        help=f"the backends whose files the folder shall hold, with commas between: {','.join(NAMES)} "
        "(default: all that compute in this precision)",
    )
    parser.add_argument(
        "--dialect",
        choices=get_args(Dialect),
        help="ort (default): ONNX Runtime's fused operators; onnx: standard operators only (opset 23), which "
        "--target tensorrt always has",
    )
    parser.add_argument("--revision", help="commit, tag or branch of a checkpoint on the hub")
    parser.add_argument(
        "--random",
        action="store_true",
        help="random weights in the shape of SOURCE (bert-base-cased, bert-large-cased, bert-base-uncased): "
        "for measuring latency only",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an engine folder that is there")


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    with open_checkpoint(
        args.source, revision=args.revision, random=args.random, seed=args.seed
    ) as checkpoint:
        options = {
            "precision": args.precision,
            "target": args.target,
            "dialect": args.dialect,
            "backends": None if args.backend is None else [name.strip() for name in args.backend.split(",")],
            "overwrite": args.overwrite,
        }
        # Said before minutes of calibration, and again by who writes.
        check_request(checkpoint.architecture, args.out, **options)
        manifest = export_engine(checkpoint, args.out, calibration=_calibrate(args, checkpoint), **options)
    size = EngineFolder(args.out, manifest).size()
    seconds = time.perf_counter() - start
    # What was left out without being asked.
    left_out = {
        name: problem
        for name in (TARGETS[manifest.precision] if args.backend is None and args.target == "cpu" else ())
        if (problem := target_problem(name, manifest.architecture))
    }
    if args.json:
        result = {
            "engine": str(args.out),
            "target": manifest.target,
            "precision": manifest.precision,
            "dialect": manifest.dialect,
            "backends": list(manifest.backends),
            "left_out": left_out,
            "latency_only": manifest.latency_only,
            "bytes": size,
            "seconds": round(seconds, 3),
            "operators": manifest.graph.get("operators", {}),
            "calibration": manifest.calibration,
        }
        emit(result, as_json=True)
        return EXIT_OK
    backends = "+".join(manifest.backends)
    notes = "".join(f"; not for {name}: {problem}" for name, problem in left_out.items())
    notes += "; random weights: for latency only, its answers mean nothing" if manifest.latency_only else ""
    emit(
        f"{args.out}: {manifest.source.name}, {manifest.precision} for {backends}, {size / 1e6:.1f} MB, "
        f"{seconds:.1f} s{notes}\nnext: bertrt {'info' if manifest.target == 'cpu' else 'build'} {args.out}",
        as_json=False,
    )
    return EXIT_OK


def _calibrate(args: argparse.Namespace, checkpoint: Checkpoint) -> Calibration | None:
    """The scales of the activations, where the engine will have any."""
    if not needs_calibration(args.precision, args.target):
        for option in ("calibrate", "calibrate_tokens", "method"):
            if getattr(args, option) is not None:
                raise InputError(
                    f"--{option.replace('_', '-')} is for --precision int8 or fp8 with --target tensorrt; "
                    "elsewhere int8 takes its scales as the activations come: leave it out"
                )
        return None
    text = args.calibrate or default_text(checkpoint)
    if args.calibrate is None and text is not None:
        note("calibrated with the built-in novel; pass --calibrate FILE with text of your field")
    with Progress("sequences calibrated") as progress:
        return calibrate(
            checkpoint,
            text,
            precision=args.precision,
            method=args.method,
            max_tokens=DEFAULT_TOKENS if args.calibrate_tokens is None else args.calibrate_tokens,
            progress=progress.advance,
        )


COMMAND = Command(
    name="export",
    help="turn a checkpoint into an engine folder",
    example="bertrt export demo demo-engine --precision int8\n"
    "bertrt export ./my-bert engine --precision fp32\n"
    "bertrt export ./my-bert native-engine --precision bf16 --backend native\n"
    "bertrt export bert-base-cased latency-engine --random\n"
    "bertrt export ./my-bert gpu-engine --target tensorrt --precision int8 --calibrate texts.txt",
    add_arguments=_add_arguments,
    run=_run,
)
