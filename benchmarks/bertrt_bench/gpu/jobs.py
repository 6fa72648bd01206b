"""Work that is done once, in a process of its own: ``python -m bertrt_bench.gpu.jobs NAME RESULT``.

The request is JSON on standard input; the file RESULT becomes ``{"result": {...}}`` or ``{"error": MESSAGE}``.
`bertrt_bench.gpu.processes.run_job` is the other side.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from bertrt.errors import BertRTError
from bertrt.plans import Profile
from bertrt_bench.gpu.lineup import ONNX, ONNXRUNTIME, ORT_CUDA, ORT_TENSORRT, TENSORRT, TORCH, TRITON

# Versions that are worth a line in the record, beside those of what is needed.
_DISTRIBUTIONS: Final = (
    "numpy",
    "transformers",
    "cuda-bindings",
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime-gpu",
)
_PROVIDERS: Final = {ORT_CUDA: "cuda", ORT_TENSORRT: "tensorrt"}


def probe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Look for one library that contestants need.

    Args:
        request: ``library`` (see `libraries_of`), and ``device``, ``cuda`` or ``cpu``.

    Returns:
        ``version`` and ``problem`` (``None``: it can be used here); of PyTorch also ``built``, with what it was built.
    """
    library = request["library"]
    if library == ONNX:
        return _imported("onnx", 'pip install "bertrt[export]"')
    if library == TRITON:
        return _imported("triton", "PyTorch's builds for CUDA bring it")
    if library == TENSORRT:
        return _tensorrt()
    if library == TORCH:
        return _torch(on_gpu=request["device"] == "cuda")
    found = _imported("onnxruntime", 'pip install "bertrt[ort]"')
    if library != ONNXRUNTIME and found["problem"] is None:
        # It imports ONNX Runtime.
        from bertrt.backends.onnxruntime.providers import provider_problem

        found["problem"] = provider_problem(_PROVIDERS[library])
    return found


def libraries_of(device: str) -> tuple[str, ...]:
    """The libraries that contestants on a device need, ``cuda`` or ``cpu``."""
    everywhere = (ONNX, ONNXRUNTIME, TORCH)
    return (*everywhere, TRITON, *_PROVIDERS, TENSORRT) if device == "cuda" else everywhere


def versions() -> dict[str, str]:
    """Versions of what is installed, by its metadata: nothing is imported."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def export(request: Mapping[str, Any]) -> dict[str, Any]:
    """Export an engine for GPUs.

    Args:
        request: ``checkpoint``, ``random``, ``precision``, ``out`` (the folder to make).

    Returns:
        ``export_seconds``, and ``engine_bytes`` of the folder.
    """
    from bertrt_export.checkpoints import open_checkpoint
    from bertrt_export.exporter import export_engine

    start = time.monotonic()
    with open_checkpoint(request["checkpoint"], random=request["random"]) as checkpoint:
        out = Path(request["out"])
        manifest = export_engine(checkpoint, out, precision=request["precision"], target="tensorrt")
    return {
        "export_seconds": time.monotonic() - start,
        "engine_bytes": sum(record.size for record in manifest.files.values()),
    }


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build the plan of an exported engine.

    Args:
        request: ``folder`` (the engine), ``profiles`` (none: those that ``bertrt build`` chooses).

    Returns:
        ``build_seconds``, and the ``plan`` as the manifest keeps it.
    """
    from bertrt.folder import EngineFolder
    from bertrt_export.plans import build_plans

    start = time.monotonic()
    profiles = [Profile.parse(profile) for profile in request["profiles"]]
    manifest = build_plans(EngineFolder.open(request["folder"], verify=False), profiles=profiles)
    return {
        "build_seconds": time.monotonic() - start,
        "plan": None if manifest.plan is None else manifest.plan.to_json(),
    }


def drift(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compare an engine with PyTorch float32, as ``bertrt drift`` does, but for the layers, which no GPU shows.

    Args:
        request: ``checkpoint``, ``folder`` (the engine), ``backend`` (``NAME`` or ``NAME:PROVIDER``),
            ``device`` (of a reference without transformers), ``text`` (a file, ``None`` for the built-in one),
            ``examples``, ``threads``.

    Returns:
        ``figures``, ``budgets``, ``violations`` (a sentence each), ``reference``, ``examples``, ``masked``, ``text``,
        ``backend``.
    """
    from bertrt_bench.gpu.engines import load_engine
    from bertrt_bench.gpu.reference import open_any_reference
    from bertrt_export.checkpoints import open_checkpoint
    from bertrt_export.demo import evaluation_text
    from bertrt_export.drift.budgets import check_budgets, resolve_budgets
    from bertrt_export.drift.compare import DEFAULT_SEED, check_reference, compare
    from bertrt_export.drift.examples import build_examples
    from bertrt_export.drift.text import read_corpus, read_text

    path = Path(request["text"]) if request["text"] else evaluation_text()
    with (
        open_checkpoint(request["checkpoint"]) as checkpoint,
        load_engine(request["folder"], request["backend"], request["threads"]) as running,
        open_any_reference(checkpoint, threads=request["threads"], device=request["device"]) as opened,
    ):
        manifest, tokenizer = running.manifest, running.tokenizer
        assert manifest is not None, "an engine of a folder has its manifest"  # noqa: S101 - for the type checker
        check_reference(manifest, checkpoint)
        positions = running.architecture.max_position_embeddings
        corpus = read_corpus(read_text(path), tokenizer, name=path.name, max_length=positions)
        examples = list(
            build_examples(
                corpus,
                tokenizer,
                count=request["examples"],
                seed=DEFAULT_SEED,
                max_length=positions,
                segments=running.architecture.type_vocab_size,
            )
        )
        found = compare(
            running.backend,
            opened.reference,
            None,
            tokenizer=tokenizer,
            heads=running.heads,
            examples=examples,
            max_length=positions,
        )
    budgets = resolve_budgets(manifest.precision, {})
    return {
        "figures": {name: value if math.isfinite(value) else None for name, value in found.figures.items()},
        "budgets": {name: limit for name, limit in budgets.items() if name in found.figures},
        "violations": [violation.message for violation in check_budgets(found.figures, budgets)],
        "reference": opened.description,
        "examples": len(examples),
        "masked": sum(example.positions.shape[0] for example in examples),
        "text": corpus.name,
        "backend": request["backend"],
    }


JOBS: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "probe": probe,
    "export": export,
    "build": build,
    "drift": drift,
}


def _imported(module: str, advice: str) -> dict[str, str | None]:
    try:
        loaded: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return {"version": None, "problem": f"{module} is not installed; {advice}"}
    except Exception as error:  # an installation that is broken in whatever way
        return {
            "version": None,
            "problem": f"{module} does not load ({_first_line(error)}); install it again",
        }
    return {"version": str(getattr(loaded, "__version__", "unknown")), "problem": None}


def _torch(*, on_gpu: bool) -> dict[str, Any]:
    found: dict[str, Any] = _imported("torch", 'pip install "bertrt[torch]"')
    if found["problem"] is not None:
        return found
    torch: Any = importlib.import_module("torch")
    found["built"] = {"cuda": torch.version.cuda, "cudnn": None}
    if on_gpu:
        cudnn = torch.backends.cudnn.version()
        found["built"]["cudnn"] = None if cudnn is None else str(cudnn)
        if not torch.cuda.is_available():
            found["problem"] = (
                f"torch {torch.__version__} sees no GPU; install its build for the CUDA of this driver"
            )
    return found


def _tensorrt() -> dict[str, str | None]:
    from bertrt.backends.registry import backend_status

    try:
        status = next(status for status in backend_status() if status.name == TENSORRT)
    except Exception as error:  # of whatever library it is
        problem = f"the backends cannot be looked for ({_first_line(error)}); see what bertrt doctor says"
        return {"version": None, "problem": problem}
    return {"version": status.version, "problem": None if status.available else status.reason}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> int:
    """Run one job; 0 when it answered, 1 when it failed."""
    name, place = sys.argv[1:]
    try:
        answer: dict[str, Any] = {"result": JOBS[name](json.load(sys.stdin))}
        text = json.dumps(answer, allow_nan=False)
    except Exception as error:  # whatever a job raises is an answer too
        traceback.print_exc()
        kind = "" if isinstance(error, BertRTError) else f"{type(error).__name__}: "
        text = json.dumps({"error": kind + (str(error) or "no message")})
    Path(place).write_text(text, encoding="utf-8")
    return int("error" in json.loads(text))


if __name__ == "__main__":
    sys.exit(main())
