"""``bertrt build``: an engine for TensorRT gets its plans."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from bertrt.backends.tensorrt.library import LIBRARIES
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, human_bytes, table
from bertrt.folder import EngineFolder
from bertrt.manifest import Manifest
from bertrt.plans import Plan, Profile
from bertrt_export.plans import build_plans


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine", metavar="ENGINE", type=Path, help="an engine folder, exported with --target tensorrt"
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="SHAPES",
        help="shapes that the plan accepts, and the one that it is tuned for, sequences x tokens: LEAST..BEST..MOST or "
        "LEAST..MOST; may be repeated (default: one for single sequences, one for up to 32, of any length)",
    )
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="N.N[,N.N]",
        help="GPUs that the plan is for; may be repeated (default: of tensorrt the GPU that is here; of tensorrt_rtx, "
        "which needs none here, all from 8.0 on that have the precision)",
    )
    # Not `choices`: the error of Python is the same.
    parser.add_argument(
        "--library",
        metavar="NAME",
        help=f"{' or '.join(LIBRARIES)} (default: the first that is installed)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="what the builder has measured: read if it is there, written at the end (tensorrt only)",
    )
    parser.add_argument(
        "--optimization-level",
        type=_level,
        metavar="N",
        help="0 (fast build) to 5 (fast plan); of tensorrt_rtx, which chooses kernels when a plan is loaded, the plan "
        "is the same at each",
    )


def _level(text: str) -> int:
    if text not in set("012345"):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 5, got {text!r}")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    profiles = [Profile.parse(text) for text in args.profile]
    capabilities = [part.strip() for text in args.compute_capability for part in text.split(",")]
    # What is read of the folder is verified when it is.
    folder = EngineFolder.open(args.engine, verify=False, plans=False)
    with Progress("build steps") as progress:
        manifest = build_plans(
            folder,
            profiles=profiles,
            compute_capabilities=capabilities,
            timing_cache=args.timing_cache,
            optimization_level=args.optimization_level,
            library=args.library,
            progress=progress.advance,
        )
    plan = cast(Plan, manifest.plan)  # which build_plans has put there
    if args.json:
        files = manifest.backends["tensorrt"]
        size = sum(manifest.files[name].size for name in files.values())
        result = {
            "engine": str(args.engine),
            "precision": manifest.precision,
            **plan.to_json(),
            "files": dict(files),
            "bytes": size,
        }
        emit(result, as_json=True)
    else:
        emit(_describe(args.engine, manifest, plan), as_json=False)
    return EXIT_OK


def _describe(path: Path, manifest: Manifest, plan: Plan) -> str:
    size = sum(part["plan_bytes"] for part in plan.report.values())
    inspector = {part: report["inspector"] for part, report in plan.report.items() if "inspector" in report}
    rows = [
        ("part", "layers", "attention", "products", "plan", "seconds", *(["workspace"] if inspector else []))
    ]
    rows += [
        (
            part,
            str(report["layers"]),
            _attention(report),
            _products(report["products"]),
            human_bytes(report["plan_bytes"]),
            f"{report['seconds']:.1f}",
            *([_workspace(inspector[part])] if inspector else []),
        )
        for part, report in plan.report.items()
    ]
    return "\n".join(
        (
            f"{path}: {manifest.source.name}, {manifest.precision}, plans of {plan.library} {plan.version} for compute "
            f"capability {', '.join(plan.compute_capabilities)}, {human_bytes(size)}, {plan.seconds:.1f} s",
            table(rows, align="<><<>>>"),
            *(
                f"the {part} was built, but could not be inspected: {found['error']}"
                for part, found in inspector.items()
                if "error" in found
            ),
            f"profiles: {', '.join(map(str, plan.profiles))}",
            f"next: bertrt info {path}",
        )
    )


def _workspace(inspected: dict[str, Any]) -> str:
    return human_bytes(inspected["device_memory"]) if "device_memory" in inspected else "?"


def _attention(report: dict[str, Any]) -> str:
    counts = (("fused", report["fused_attention"]), ("taken apart", report["decomposed_attention"]))
    return ", ".join(f"{count} {kind}" for kind, count in counts if count) or "none"


def _products(products: list[dict[str, str]]) -> str:
    """How many products have operands of each type."""
    types = [product["operands"] for product in products]
    return ", ".join(f"{types.count(name)} {name}" for name in dict.fromkeys(types))


COMMAND = Command(
    name="build",
    help="build the TensorRT plans of an engine",
    example="bertrt build engine\n"
    "bertrt build engine --profile 1x16..1x64 --profile 1x64..8x128..32x512\n"
    "bertrt build engine --compute-capability 8.9,12.0 --library tensorrt_rtx",
    add_arguments=_add_arguments,
    run=_run,
)
