"""From an engine in parts to its TensorRT plans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from bertrt.backends.parts import parts_of
from bertrt.backends.tensorrt.library import find_library, library_version
from bertrt.errors import PlanBuildError
from bertrt.folder import EngineFolder
from bertrt.manifest import Manifest
from bertrt.plans import Plan, Profile
from bertrt_export.plans.builder import BuildOptions, Steps, build_plan, make_builder
from bertrt_export.plans.capabilities import choose_capabilities, present_capability, tried_device
from bertrt_export.plans.inspector import inspect_plan
from bertrt_export.plans.keep import Staging
from bertrt_export.plans.network import parse_part
from bertrt_export.plans.profiles import check_profiles, mlm_rows
from bertrt_export.plans.timing_cache import TimingCache


def build_plans(
    folder: EngineFolder,
    *,
    profiles: Sequence[Profile] = (),
    compute_capabilities: Sequence[str] = (),
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    library: str | None = None,
    progress: Callable[[], object] | None = None,
) -> Manifest:
    """Build the plans of an engine's parts and put them into its folder, all or none.

    An older plan stays in its place until the new one is whole. The SHA-256 of the graphs and weights is compared
    before they are read. An interruption ends the build at its next step, and leaves the folder as it was.

    Args:
        folder: an engine of target ``tensorrt``.
        profiles: of the encoder; none: see `bertrt_export.plans.default_profiles`. `bertrt_export.plans.profiles` says
            which shapes the heads get.
        compute_capabilities: such as ``["8.9"]``; none: see `bertrt_export.plans.capabilities.choose_capabilities`.
        timing_cache: a file that is read if it is there, and written at the end, also of a build that fails once a
            part is built; of ``tensorrt`` only.
        optimization_level: see `BuildOptions`.
        library: ``tensorrt`` or ``tensorrt_rtx``; by default the first of them that is installed.
        progress: called at every step of the builder, from a thread of its own; what it raises ends the build.

    Returns:
        The folder's new manifest. Its ``plan.report`` has for each part: ``layers`` of the parsed network;
        ``fused_attention`` and ``decomposed_attention``, attention layers of either kind; ``products``, the name of
        each matrix product with the type of its operands; ``workspace_limit``, ``plan_bytes``, ``seconds``; and with
        a GPU that the plan is for ``inspector``, see `bertrt_export.plans.inspector.inspect_plan`, or what it could
        not do as its only entry ``error``.

    Raises:
        InputError: profiles, compute capabilities, level or timing cache are not what they must be.
        BackendUnavailableError: there is no library, or none that works here.
        HashMismatchError, MissingFileError: a file is not the one that was exported.
        PlanBuildError: the engine is of another target, a graph cannot be read or built, or the folder not written.
    """
    manifest = folder.manifest
    graphs = manifest.backends.get("onnxruntime", {})
    parts = parts_of(manifest.heads)
    if manifest.target != "tensorrt" or any(part not in graphs for part in parts):
        raise PlanBuildError(
            f"the engine {str(folder.path)!r} was exported for {manifest.target}, a plan is built of one for "
            f"tensorrt: bertrt export SOURCE OUT --target tensorrt --precision {manifest.precision}"
        )
    checked = check_profiles(profiles, manifest.architecture)
    module = find_library(library)
    options = BuildOptions(
        profiles=checked,
        compute_capabilities=choose_capabilities(module, compute_capabilities, manifest.precision),
        optimization_level=optimization_level,
        detailed=present_capability() is not None,
    )
    cache = None if timing_cache is None else TimingCache(timing_cache, module)
    start = time.perf_counter()
    with _keeping(cache), Staging(folder, tuple(dict.fromkeys(graphs.values()))) as staging:
        folder.check(hashes=graphs.values(), plans=False)
        report = _in_a_thread(
            lambda steps: _build_parts(module, folder, parts, options, staging, cache, steps), Steps(progress)
        )
        return staging.keep(
            Plan(
                library=module.__name__,
                version=library_version(module),
                compute_capabilities=options.compute_capabilities,
                profiles=options.profiles,
                mlm_rows=mlm_rows(options.profiles, manifest.heads),
                seconds=round(time.perf_counter() - start, 3),
                report=report,
                device=tried_device(module),
            )
        )


def _build_parts(
    module: ModuleType,
    folder: EngineFolder,
    parts: Sequence[str],
    options: BuildOptions,
    staging: Staging,
    cache: TimingCache | None,
    steps: Steps,
) -> dict[str, Any]:
    manifest = folder.manifest
    builder = make_builder(module)
    # What is wrong with any graph is said before the first is built.
    parsed = [parse_part(module, builder, folder, part) for part in parts]
    inspected = present_capability() in options.compute_capabilities
    report: dict[str, Any] = {}
    for part in parsed:
        built = build_plan(
            module,
            builder,
            part,
            manifest.architecture,
            manifest.precision,
            options,
            cache=cache,
            steps=steps,
        )
        record = staging.add(part.part, built.data)
        report[part.part] = {
            "layers": int(part.network.num_layers),
            "fused_attention": part.fused_attention,
            "decomposed_attention": len(part.attention) - part.fused_attention,
            "products": [{"name": product.name, "operands": product.operands} for product in part.products],
            "workspace_limit": built.workspace_limit,
            "plan_bytes": record.size,
            "seconds": built.seconds,
        }
        if inspected:
            report[part.part]["inspector"] = _inspect(module, built.data, part.part)
    return report


def _inspect(module: ModuleType, data: Any, part: str) -> dict[str, Any]:
    """It informs, no more: a plan is not thrown away for it."""
    try:
        return inspect_plan(module, data, part)
    except PlanBuildError as error:
        return {"error": str(error)}


@contextlib.contextmanager
def _keeping(cache: TimingCache | None) -> Iterator[None]:
    """Keep the cache, whatever becomes of the build: what was measured took minutes."""
    try:
        yield
    except BaseException as error:
        try:
            if cache is not None:
                cache.keep()
        except PlanBuildError as second:
            error.add_note(str(second))
        raise
    if cache is not None:
        cache.keep()


def _in_a_thread(work: Callable[[Steps], dict[str, Any]], steps: Steps) -> dict[str, Any]:
    """Do the work in a thread of its own, so that an interruption is raised here and not inside the library.

    The library calls Python at every step and would swallow what is raised there.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="bertrt-build") as pool:
        future = pool.submit(work, steps)
        try:
            return future.result()
        except BaseException:
            steps.stop()
            raise
