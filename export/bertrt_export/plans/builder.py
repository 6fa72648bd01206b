"""Building the plan of one part."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from bertrt.architecture import BertArchitecture
from bertrt.backends.parts import ENCODER
from bertrt.backends.tensorrt.library import TENSORRT, Messages, collect_messages, library_logger
from bertrt.errors import InputError, PlanBuildError
from bertrt.manifest import Precision
from bertrt.plans import Profile
from bertrt_export.plans.capabilities import member_name
from bertrt_export.plans.complaints import attention_has_no_kernel, describe_messages
from bertrt_export.plans.network import ParsedPart
from bertrt_export.plans.profiles import Range, input_ranges
from bertrt_export.plans.timing_cache import TimingCache

_HIGHEST_LEVEL: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How plans are built.

    Attributes:
        profiles: of the encoder.
        compute_capabilities: of the GPUs.
        optimization_level: 0 to 5, how long the builder looks for better kernels; ``None``: the library's default.
            TensorRT for RTX chooses kernels when a plan is loaded: its builds are the same at every level.
        detailed: whether the inspector shall be able to name types and kernels.

    Raises:
        InputError: the level is out of range.
    """

    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...]
    optimization_level: int | None = None
    detailed: bool = False

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and (type(level) is not int or not 0 <= level <= _HIGHEST_LEVEL):
            raise InputError(
                f"the optimization level is a whole number from 0 to {_HIGHEST_LEVEL}, got {level!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlan:
    """A plan, and how it was built.

    Attributes:
        data: the library's buffer.
        workspace_limit: bytes that a layer may take for its intermediate results.
        seconds: that the build took.
    """

    data: Any
    workspace_limit: int
    seconds: float


class Steps:
    """What the builder has done, and whether it shall go on.

    Args:
        advance: called at every step, in the builder's thread.
    """

    def __init__(self, advance: Callable[[], object] | None = None) -> None:
        self._advance = advance
        self._stopped = threading.Event()
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Let the build end at its next step."""
        self._stopped.set()

    def step(self) -> bool:
        """Count one, and say whether to go on; raises nothing, since the library could not pass it on."""
        try:
            if self._advance is not None and not self._stopped.is_set():
                self._advance()
        except BaseException as error:
            self.error = error
            self.stop()
        return not self._stopped.is_set()


def make_builder(module: ModuleType) -> Any:
    """The library's ``Builder``.

    Raises:
        PlanBuildError: it cannot be made.
    """
    with collect_messages() as messages:
        try:
            return module.Builder(library_logger(module))
        except (RuntimeError, TypeError) as error:  # pybind11 turns a null pointer into the latter
            said = describe_messages(messages) if messages.errors else str(error)
            raise PlanBuildError(f"{module.__name__} cannot build plans here: {said}") from error


def build_plan(
    module: ModuleType,
    builder: Any,
    parsed: ParsedPart,
    architecture: BertArchitecture,
    precision: Precision,
    options: BuildOptions,
    *,
    cache: TimingCache | None = None,
    steps: Steps | None = None,
) -> BuiltPlan:
    """Build the plan of a parsed part.

    Args:
        module: the library.
        builder: of `make_builder`.
        parsed: the part.
        architecture: of the model.
        precision: of the engine. In float32, products do without TensorFloat-32: of its 10 bits each layer would show.
        options: see there.
        cache: what earlier builds have measured.
        steps: counts and can stop the build.

    Raises:
        PlanBuildError: the builder refuses; with its reasons.
        InputError: the library does not take the timing cache.
    """
    steps = steps or Steps()
    start = time.perf_counter()
    config = builder.create_builder_config()
    for ranges in input_ranges(parsed.part, options.profiles, architecture):
        config.add_optimization_profile(_make_profile(builder, parsed, ranges))
    if module.__name__ != TENSORRT:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            member = module.ComputeCapability.__members__[member_name(capability)]
            config.set_compute_capability(member, index)
        # Else it may allocate memory in a run, which then cannot be captured, and no context says how much.
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if precision == "fp32":
        config.clear_flag(module.BuilderFlag.TF32)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.detailed:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # Of the library's own objects only the configuration would refer to it.
    monitor = _make_monitor(module, steps)
    config.progress_monitor = monitor
    if cache is not None:
        cache.give(config)
    with collect_messages() as messages:
        data = builder.build_serialized_network(parsed.network, config)
    if steps.error is not None:
        raise steps.error
    if data is None:
        raise _refused(module, parsed, architecture, precision, messages)
    if cache is not None:
        cache.take(config)
    return BuiltPlan(
        data=data,
        workspace_limit=int(config.get_memory_pool_limit(module.MemoryPoolType.WORKSPACE)),
        seconds=round(time.perf_counter() - start, 3),
    )


def _make_profile(builder: Any, parsed: ParsedPart, ranges: dict[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        try:
            profile.set_shape(name, shapes.least, shapes.best, shapes.most)
        except (RuntimeError, ValueError) as error:
            raise PlanBuildError(
                f"cannot build a plan of {parsed.file.name!r}: its input {name!r} does not take the shapes "
                f"{shapes.least}..{shapes.best}..{shapes.most} ({error}); choose other profiles"
            ) from error
    return profile


def _make_monitor(module: ModuleType, steps: Steps) -> Any:
    base: Any = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # known when the library is
        def __init__(self) -> None:
            # Not super(): the bindings want their own by name.
            base.__init__(self)

        def phase_start(self, _phase: str, _parent: str | None, _steps: int) -> None:
            pass  # only steps are counted

        def phase_finish(self, _phase: str) -> None:
            pass

        def step_complete(self, _phase: str, _step: int) -> bool:
            return steps.step()

    return Monitor()


def _refused(
    module: ModuleType,
    parsed: ParsedPart,
    architecture: BertArchitecture,
    precision: Precision,
    messages: Messages,
) -> PlanBuildError:
    file = f"cannot build a plan of {parsed.file.name!r} in {str(parsed.file.parent)!r}"
    if parsed.part == ENCODER and attention_has_no_kernel(messages):
        return PlanBuildError(
            f"{file}: {module.__name__} has no fused attention for {architecture.num_attention_heads} heads of "
            f"{architecture.head_size} in {precision}, node {next(iter(parsed.attention), '?')!r}; export the engine "
            "with --precision fp32, whose attention is taken apart"
        )
    return PlanBuildError(f"{file}: {module.__name__} refuses: {describe_messages(messages)}")
