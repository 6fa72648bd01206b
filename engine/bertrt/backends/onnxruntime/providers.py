"""ONNX Runtime's providers for NVIDIA GPUs: whether they can be used here, how they are set up, and that they are used.

``onnxruntime-gpu`` 1.31 is built for CUDA 13 and TensorRT 10. A provider whose libraries are missing is left out
without an error, and the CPU takes its place: that is looked for before and after a session is made.

Source: https://onnxruntime.ai/docs/execution-providers/, for the options.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

import onnxruntime

from bertrt.architecture import BertArchitecture
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import MLM_ROWS
from bertrt.backends.onnxruntime.engine_cache import engine_cache, open_cached
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, NAME, Providers, load_graph
from bertrt.backends.parts import CANDIDATES, ENCODER, part_inputs
from bertrt.errors import BackendUnavailableError, InputError
from bertrt.folder import EngineFolder
from bertrt.plans import Profile, Shape

CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
_PROVIDERS: Final[Mapping[str, str]] = {"cuda": CUDA, "tensorrt": TENSORRT}
_INSTALL: Final = 'pip install "bertrt[cuda]"'
# Attention is read by TensorRT's parser from 10.14 on.
_INSTALL_TENSORRT: Final = 'pip install "tensorrt-cu13-libs>=10.14,<11"'
# Where a provider is there, and is given nothing to do.
_REMEDY: Final[Mapping[str, str]] = {
    CUDA: f"update onnxruntime-gpu: {_INSTALL}",
    TENSORRT: f"its parser knows the graphs from TensorRT 10.14 on: {_INSTALL_TENSORRT}; or take the provider cuda",
}
# What the TensorRT provider is linked with, the first two from a package of TensorRT.
_TENSORRT_LIBRARIES: Final = ("libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9")
_TENSORRT_PACKAGE: Final = "tensorrt_libs"
# Nodes of our graphs that compute shapes: ONNX Runtime puts them on the CPU on purpose, so that
# "session.disable_cpu_ep_fallback" would refuse every encoder.
_SHAPE_OPERATORS: Final = frozenset({"Shape", "Concat"})
# Sequences of a block, and its tokens where the model has more positions than BERT's 512.
_MOST_SEQUENCES: Final = 32
_USUAL_TOKENS: Final = 512
_LEAST_TOKENS: Final = 16
_BEST: Final = (8, 128)


def provider_problem(provider: str) -> str | None:
    """Why a provider cannot be used on this machine and what to do about it, or ``None`` if it can.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.

    Raises:
        InputError: another one.
    """
    if provider == "cpu":
        return None
    if provider not in _PROVIDERS:
        raise InputError(f"provider must be one of cpu, {', '.join(_PROVIDERS)}, got {provider!r}")
    if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return _package_problem(_PROVIDERS[provider])
    # Imported here, with all that speaks to a GPU.
    from bertrt.backends import cuda

    return cuda.problem() or _library_problem(provider)


def check_providers(session: onnxruntime.InferenceSession, providers: Providers, part: str) -> list[str]:
    """See to it that a session, loaded to record what runs where, runs on its first provider.

    Returns:
        The operators of which some are left to a second one.

    Raises:
        BackendUnavailableError: ONNX Runtime has left the provider out, gives it nothing to do, or has nodes computed
            by the CPU.
    """
    asked, found = providers[0][0], session.get_providers()
    if found[0] != asked:
        raise BackendUnavailableError(
            f"onnxruntime {onnxruntime.__version__} was asked for its provider {asked} and took {found[0]}; it has "
            f"printed why. Most often a library of CUDA, cuDNN or TensorRT is missing: {_INSTALL}"
        )
    operators: dict[str, set[str]] = {}
    for graph in session.get_provider_graph_assignment_info():
        operators.setdefault(graph.ep_name, set()).update(node.op_type for node in graph.get_nodes())
    if computed := sorted(operators.pop(CPU_PROVIDER, set()) - _SHAPE_OPERATORS):
        raise BackendUnavailableError(
            f"onnxruntime {onnxruntime.__version__} would compute on the CPU what its provider {asked} has no kernels "
            f"for: {', '.join(computed)}; update onnxruntime-gpu, export the engine in another precision, or take the "
            "backend tensorrt"
        )
    if not operators.pop(asked, set()):
        others = ", ".join(operators) or "no other either"
        raise BackendUnavailableError(
            f"onnxruntime {onnxruntime.__version__} gave its provider {asked} no node of the {part} ({others} would "
            f"run it); {_REMEDY[asked]}"
        )
    return sorted(set().union(*operators.values()))


def profiles_of(architecture: BertArchitecture) -> tuple[Profile, ...]:
    """Between which shapes blocks are run: up to 32 sequences of 512 tokens, and of longer ones as many tokens."""
    positions = architecture.max_position_embeddings
    usual = min(positions, _USUAL_TOKENS)
    least = (1, min(usual, _LEAST_TOKENS))
    profiles = [Profile(least, (_BEST[0], min(usual, _BEST[1])), (_MOST_SEQUENCES, usual))]
    if positions > usual:
        most = max(1, _MOST_SEQUENCES * usual // positions)
        profiles.append(Profile(least, (1, positions), (most, positions)))
    return tuple(profiles)


def gpu_places(
    folder: EngineFolder, provider: str, devices: Sequence[int], threads: int, profiles: Sequence[Profile]
) -> list[SessionPlace]:
    """A place on each GPU for the sessions of an engine in parts.

    What TensorRT leaves to CUDA is said in a warning, once for each part.

    Args:
        folder: the engine.
        provider: ``cuda`` or ``tensorrt``.
        devices: GPUs by number.
        threads: of the processor, for what little of a run is not on a GPU.
        profiles: between which shapes blocks are run.

    Raises:
        BackendUnavailableError: there is no folder to keep TensorRT's engines in; from a place's ``open`` also what
            `check_providers` raises.
    """
    # Workers load side by side, each all parts.
    said: set[str] = set()

    def load(part: str, providers: Providers) -> onnxruntime.InferenceSession:
        session = load_graph(folder, part, threads, providers)
        left = check_providers(session, providers, part)
        if left and part not in said:
            said.add(part)
            warnings.warn(
                f"onnxruntime's provider {provider} leaves operators of the {part} to CUDA, which is slower: "
                f"{', '.join(left)}; the backend tensorrt takes all of them",
                RuntimeWarning,
                stacklevel=1,
            )
        return session

    def place(device: int) -> SessionPlace:
        def open_part(part: str) -> onnxruntime.InferenceSession:
            options = _cuda_options(device)
            if provider == "cuda":
                return load(part, [(CUDA, options)])
            shapes = _shape_ranges(part, folder.manifest.architecture, profiles)

            def load_from(cache: Path) -> onnxruntime.InferenceSession:
                # What TensorRT does not take is CUDA's.
                second = CUDA, {**options, "enable_cuda_graph": "0"}
                return load(part, [(TENSORRT, _tensorrt_options(device, cache, shapes)), second])

            return open_cached(engine_cache(folder, part, shapes), load_from)

        # The TensorRT provider of 1.31 knows no gpu_graph_id: it would replay the graph of one shape for all.
        return SessionPlace(open=open_part, device_type="cuda", device_id=device, graphs=provider == "cuda")

    return [place(device) for device in devices]


def _cuda_options(device: int) -> dict[str, str]:
    return {
        "device_id": str(device),
        # Double of what is needed each time it grows, otherwise.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
        # A float32 product shall be one: TF32 has float16's 11 bits.
        "use_tf32": "0",
    }


def _tensorrt_options(device: int, cache: Path, shapes: Sequence[str]) -> dict[str, str]:
    # Neither trt_fp16_enable nor the like: without them the network is strongly typed, as the graphs are.
    return {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_profile_min_shapes": shapes[0],
        "trt_profile_opt_shapes": shapes[1],
        "trt_profile_max_shapes": shapes[2],
    }


def _shape_ranges(part: str, architecture: BertArchitecture, profiles: Sequence[Profile]) -> list[str]:
    """The least, the best and the largest shapes of a part's inputs, in the provider's words."""
    best = profiles[0].best
    least = min(profile.least[0] for profile in profiles), min(profile.least[1] for profile in profiles)
    most = max(profile.most[0] for profile in profiles), max(profile.most[1] for profile in profiles)
    ranges = ((least, least[0]), (best, best[0]), (most, MLM_ROWS))
    return [
        ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())
        for shapes in (_input_shapes(part, architecture, profiles, *sizes) for sizes in ranges)
    ]


def _input_shapes(
    part: str, architecture: BertArchitecture, profiles: Sequence[Profile], block: Shape, mlm_rows: int
) -> dict[str, tuple[int, ...]]:
    if part == ENCODER:
        return dict.fromkeys(part_inputs(part), block)
    # The heads get the memory of the largest block, whatever lies in it.
    tokens = max(profile.most[0] * profile.most[1] for profile in profiles)
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (tokens, architecture.hidden_size),
        "mlm_positions": (mlm_rows,),
        "mlm_candidates": (mlm_rows, CANDIDATES),
        "pooled_rows": (block[0],),
    }
    return {name: shapes[name] for name in part_inputs(part)}


def _package_problem(name: str) -> str:
    installed = [package for package in ("onnxruntime", "onnxruntime-gpu") if _is_installed(package)]
    has = f"onnxruntime {onnxruntime.__version__} has no {name}"
    if len(installed) == 2:
        return (
            f"{has}: the packages onnxruntime and onnxruntime-gpu are both installed, and the one for CPUs lies over "
            f"the other; pip uninstall -y {' '.join(installed)}, then {_INSTALL}"
        )
    return f"{has}: it is a build for CPUs; pip uninstall -y {' '.join(installed) or NAME}, then {_INSTALL}"


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _library_problem(provider: str) -> str | None:
    """Which library of a provider does not load.

    The provider itself is not loaded to find out: while it is, it expects ONNX Runtime around it.
    """
    missing = list(_preload())
    if provider == "tensorrt" and not missing:
        missing = _load_tensorrt()
    if not missing:
        return None
    install = _INSTALL
    if any(name in line for line in missing for name in _TENSORRT_LIBRARIES[:2]):
        install = f"install TensorRT 10, which onnxruntime is built for: {_INSTALL_TENSORRT}"
    return f"onnxruntime's provider {provider} lacks libraries ({'; '.join(missing)}); {install}"


@functools.cache
def _preload() -> tuple[str, ...]:
    """Load CUDA and cuDNN from Python packages or from where the system finds them, once; what loads from neither.

    Not looked for is what the library passes over in silence: cuDNN, cuFFT and NVRTC. Where one of them is missing the
    provider is left out, which `check_providers` finds.
    """
    # It prints; the answers of a command go the same way.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls()
    said = (line.strip().partition("Failed to load ") for line in printed.getvalue().splitlines())
    failed = (rest.partition(": ") for before, _, rest in said if rest and not before)
    # A path is the first attempt, in Python's packages; what fails there may load by its plain name, the second. Of
    # "Failed to load NAME: REASON" the reason begins with the name again.
    return tuple(reason for name, _, reason in failed if "/" not in name)


def _load_tensorrt() -> list[str]:
    """Load TensorRT from its Python package, where there is one, or from where the system finds it; what fails."""
    spec = importlib.util.find_spec(_TENSORRT_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    failures = []
    for name in _TENSORRT_LIBRARIES:
        path = next((folder / name for folder in folders if (folder / name).is_file()), Path(name))
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            failures.append(str(error))
    return failures
