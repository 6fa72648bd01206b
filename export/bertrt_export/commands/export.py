"""``bertrt export``: a checkpoint becomes an engine folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, note
from bertrt.errors import ExportError, InputError
from bertrt.folder import EngineFolder
from bertrt.manifest import Dialect, Precision, Target
from bertrt_export.calibration import DEFAULT_TEXTS, METHODS, Calibration, calibrate, default_text
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.exporter import export_engine
from bertrt_export.quantize import WeightType
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
        calibration = _calibrate(args, checkpoint)
        manifest = export_engine(
            checkpoint,
            args.out,
            precision=args.precision,
            target=args.target,
            dialect=args.dialect,
            calibration=calibration,
            backends=None if args.backend is None else [name.strip() for name in args.backend.split(",")],
            overwrite=args.overwrite,
        )
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
    needed = args.target == "tensorrt" and args.precision in get_args(WeightType)
    if not needed:
        for option in ("calibrate", "method"):
            if getattr(args, option) is not None:
                raise InputError(
                    f"--{option} is for --precision int8 or fp8 with --target tensorrt; elsewhere int8 takes its "
                    "scales as the activations come: leave it out"
                )
        return None
    if args.out.exists() and not args.overwrite:
        # Said before minutes of calibration, and again by who writes.
        raise ExportError(f"{str(args.out)!r} exists; choose another place or pass --overwrite")
    text = args.calibrate or default_text(checkpoint)
    if args.calibrate is None and text is not None:
        note("calibrated with the built-in novel; pass --calibrate FILE with text of your field")
    with Progress("texts", total=DEFAULT_TEXTS) as progress:
        return calibrate(
            checkpoint, text, precision=args.precision, method=args.method, progress=progress.advance
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
