"""ONNX Runtime's providers for GPUs: why one cannot be used, its options, and a CPU that takes its place unasked.

No GPU is needed: what the library would be told is looked at, and what it does without its libraries it does here too.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bertrt.architecture import BertArchitecture
from bertrt.backends import cuda
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.buckets import Buckets, row_bucket
from bertrt.backends.onnxruntime import backend as module
from bertrt.backends.onnxruntime import providers as onnxruntime_providers
from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend, provider_problem
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import MLM_ROWS
from bertrt.backends.onnxruntime.providers import (
    CUDA,
    TENSORRT,
    check_providers,
    gpu_places,
    profiles_of,
)
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, load_graph
from bertrt.errors import BackendUnavailableError, InputError
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

ON_CPU = [(CPU_PROVIDER, {})]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    """The demo engine in parts, in float32."""
    out = tmp_path_factory.mktemp("parts") / "engine"
    with open_checkpoint("demo") as checkpoint:
        export_engine(checkpoint, out, precision="fp32", target="tensorrt")
    return EngineFolder.open(out)


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime-gpu were installed, on a machine with a GPU and all libraries of CUDA."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU_PROVIDER])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(cuda, "problem", lambda: None)
    onnxruntime_providers._preload.cache_clear()
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", ("libm.so.6",))


@pytest.fixture(autouse=True)
def _forget_what_was_loaded() -> Any:
    yield
    onnxruntime_providers._preload.cache_clear()


def test_providers_that_can_be_used(gpu_build: None) -> None:
    assert [provider_problem(name) for name in ("cpu", "cuda", "tensorrt")] == [None, None, None]


def test_an_unknown_provider() -> None:
    with pytest.raises(InputError, match="one of cpu, cuda, tensorrt, got 'rocm'"):
        provider_problem("rocm")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (["onnxruntime"], "a build for CPUs; pip uninstall -y onnxruntime, then pip install"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "both installed.*pip uninstall -y onnxruntime onnxruntime-gpu, then",
        ),
        ([], "a build for CPUs; pip uninstall -y onnxruntime, then"),
    ],
)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_build_for_cpus(
    provider: str, installed: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise onnxruntime_providers.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(onnxruntime_providers.metadata, "version", version)
    problem = provider_problem(provider)
    assert problem is not None
    assert re.search(message, problem), problem
    assert "bertrt[cuda]" in problem


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_what_is_wrong_with_cuda_itself(
    provider: str, gpu_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: "the driver is too old")
    assert provider_problem(provider) == "the driver is too old"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_libraries_of_cuda_that_are_missing(
    provider: str, gpu_build: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library prints what is missing, on standard output; what it prints of other things is no problem."""
    calls = []

    def preload() -> None:
        calls.append(1)
        print("Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file: No such file")
        print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    for _ in range(2):
        assert provider_problem(provider) == (
            f"onnxruntime's provider {provider} lacks libraries (libcurand.so.10: cannot open shared object file: "
            'No such file); pip install "bertrt[cuda]"'
        )
    assert calls == [1]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_libraries_of_tensorrt_that_are_missing(gpu_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("libfirst_of_none.so.10", "libm.so.6")
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", names)
    assert provider_problem("cuda") is None
    problem = provider_problem("tensorrt")
    assert problem is not None
    assert problem.startswith("onnxruntime's provider tensorrt lacks libraries (libfirst_of_none.so.10: ")
    assert 'pip install "tensorrt-cu13-libs==10.*"' in problem


def test_tensorrt_is_found_among_pythons_packages(
    gpu_build: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "libbertrt_test_of_loading.so.10"
    package = tmp_path / "tensorrt_libs"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", (name,))
    monkeypatch.setitem(sys.modules, "tensorrt_libs", None)
    monkeypatch.delitem(sys.modules, "tensorrt_libs")
    monkeypatch.syspath_prepend(tmp_path)
    assert provider_problem("tensorrt") is not None
    # Any library that loads.
    shared = "libonnxruntime_providers_shared.so"
    shutil.copy(Path(onnxruntime.__file__).parent / "capi" / shared, package / name)
    assert provider_problem("tensorrt") is None


def test_a_cpu_in_the_place_of_a_gpu(parts: EngineFolder) -> None:
    """ONNX Runtime leaves a provider out whose libraries do not load, and says nothing in its answer."""
    session = load_graph(parts, "encoder", 1, ON_CPU)
    with pytest.raises(
        BackendUnavailableError, match=f"asked for its provider {CUDA} and took {CPU_PROVIDER}"
    ):
        check_providers(session, [(CUDA, {})])


def test_nodes_that_the_cpu_would_compute(parts: EngineFolder) -> None:
    session = load_graph(parts, "encoder", 1, ON_CPU)
    with pytest.raises(
        BackendUnavailableError, match="would compute on the CPU .*: Add, Attention, "
    ) as caught:
        check_providers(session, ON_CPU)
    # Which ONNX Runtime computes there on purpose.
    assert "Shape" not in str(caught.value)


def test_nodes_that_compute_shapes_may_be_the_cpus() -> None:
    def graph(provider: str, *operators: str) -> Any:
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    def session(*operators: str) -> Any:
        graphs = [graph(CUDA, "MatMul", "Attention"), graph(CPU_PROVIDER, *operators)]
        return SimpleNamespace(
            get_providers=lambda: [CUDA, CPU_PROVIDER], get_provider_graph_assignment_info=lambda: graphs
        )

    check_providers(session("Shape", "Concat"), [(CUDA, {})])
    with pytest.raises(BackendUnavailableError, match="no kernels for: QuantizeLinear;"):
        check_providers(session("Shape", "QuantizeLinear"), [(CUDA, {})])


def with_positions(positions: int) -> BertArchitecture:
    return BertArchitecture(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=positions,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )


POSITIONS = [1, 10, 50, 512, 513, 2048, 40000]


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_length_has_a_shape_and_blocks_an_end(positions: int) -> None:
    buckets = Buckets(profiles_of(with_positions(positions)), rebuild="nothing")
    assert buckets.longest == positions
    assert (buckets.limits().tokens or 0) <= max(32 * 512, positions)
    for length in {1, 15, 16, 17, 511, 512, 513, positions} & set(range(1, positions + 1)):
        shape = buckets.shape(1, length)
        assert shape is not None
        assert shape[1] >= length
        if length <= 512:
            assert buckets.shape(32, length) is not None


def options_of(
    folder: EngineFolder,
    provider: str,
    monkeypatch: pytest.MonkeyPatch,
    part: str = "encoder",
    device: int = 1,
) -> tuple[list[tuple[str, dict[str, str]]], SessionPlace]:
    """What ONNX Runtime would be told when a part is opened on a GPU."""
    told: list[Any] = []

    def load(folder: EngineFolder, role: str, threads: int, providers: Any) -> Any:
        assert (role, threads) == (part, 3)
        told.extend(providers)
        return SimpleNamespace(
            get_providers=lambda: [name for name, _ in providers],
            get_provider_graph_assignment_info=list,
        )

    monkeypatch.setattr(onnxruntime_providers, "load_graph", load)
    profiles = profiles_of(folder.manifest.architecture)
    (place,) = gpu_places(folder, provider, [device], 3, profiles)
    place.open(part)
    return told, place


def test_cudas_options(parts: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    told, place = options_of(parts, "cuda", monkeypatch)
    assert told == [
        (
            CUDA,
            {
                "device_id": "1",
                "arena_extend_strategy": "kSameAsRequested",
                "enable_cuda_graph": "1",
                "use_tf32": "0",
            },
        )
    ]
    assert (place.device_type, place.device_id, place.graphs, str(place)) == ("cuda", 1, True, "GPU 1")


def test_tensorrts_options(parts: EngineFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path / "cache"))
    told, place = options_of(parts, "tensorrt", monkeypatch)
    assert [name for name, _ in told] == [TENSORRT, CUDA]
    options = told[0][1]
    assert options["device_id"] == told[1][1]["device_id"] == "1"
    # One graph for all shapes would give the answers of one of them.
    assert "trt_cuda_graph_enable" not in options
    assert told[1][1]["enable_cuda_graph"] == "0"
    assert place.graphs is False
    # With any of these the network would not be strongly typed.
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & set(options)
    assert options["trt_engine_cache_enable"] == "1"
    path = Path(options["trt_engine_cache_path"])
    assert path.is_dir()
    assert path.parent == tmp_path / "cache" / "onnxruntime-tensorrt"
    assert path.stat().st_mode & 0o077 == 0


def test_tensorrts_engines_are_kept_for_each_graph_and_its_weights(
    parts: EngineFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The provider names its files by the graph only, which two models of one size share."""
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))

    def path(folder: EngineFolder, part: str = "encoder") -> str:
        told, _ = options_of(folder, "tensorrt", monkeypatch, part)
        return told[0][1]["trt_engine_cache_path"]

    files = dict(parts.manifest.files)
    files["model.onnx_data"] = replace(files["model.onnx_data"], sha256="0" * 64)
    other = EngineFolder(parts.path, replace(parts.manifest, files=files))
    found = [path(parts), path(parts, "mlm"), path(parts, "pooler"), path(other), path(other, "mlm")]
    assert len(set(found)) == 5
    assert path(parts) == found[0]


def test_no_folder_for_tensorrts_engines(
    parts: EngineFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailableError, match="set BERTRT_CACHE to a folder that can be written"):
        options_of(parts, "tensorrt", monkeypatch)


@pytest.mark.parametrize("positions", POSITIONS)
def test_tensorrts_shapes_hold_every_block(
    positions: int, parts: EngineFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An engine that meets a shape outside of its range would be built again, during a run."""
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    sizes = with_positions(positions)
    folder = EngineFolder(parts.path, replace(parts.manifest, architecture=sizes))
    buckets = Buckets(profiles_of(sizes), rebuild="nothing")
    limits = buckets.limits()

    def ranges(part: str) -> list[dict[str, tuple[int, ...]]]:
        told, _ = options_of(folder, "tensorrt", monkeypatch, part)
        texts = [told[0][1][f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]
        return [
            {
                name: tuple(map(int, shape.split("x")))
                for name, shape in (item.split(":") for item in text.split(","))
            }
            for text in texts
        ]

    def check(part: str, **shapes: tuple[int, ...]) -> None:
        least, best, most = ranges(part)
        assert set(least) == set(best) == set(most) == set(shapes)
        for name, shape in shapes.items():
            assert len(shape) == len(least[name])
            for low, middle, size, high in zip(least[name], best[name], shape, most[name], strict=True):
                assert low <= size <= high
                assert low <= middle <= high

    for sequences in {1, 2, 3, 5, limits.sequences or 1}:
        for length in {1, positions // 2 or 1, positions}:
            if shape := buckets.shape(min(sequences, limits.sequences or 1), length):
                check("encoder", input_ids=shape, attention_mask=shape, token_type_ids=shape)
    states = (limits.tokens or 1, 24)
    for rows in (1, 3, MLM_ROWS):
        padded = row_bucket(rows, MLM_ROWS)
        check("mlm", hidden_states=states, mlm_positions=(padded,), mlm_candidates=(padded, 16))
    for rows in (1, limits.sequences or 1):
        check("pooler", hidden_states=states, pooled_rows=(row_bucket(rows, limits.sequences or 1),))


def make_batch(lengths: list[int]) -> TokenBatch:
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 8000, sum(lengths)).astype(np.int32)
    return TokenBatch(ids, ids * 0, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_engine_on_gpus(
    provider: str, gpu_build: None, parts: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the arguments to the answers, with the CPU in the place of two GPUs."""
    asked: list[Any] = []

    def places(folder: EngineFolder, *arguments: Any) -> list[SessionPlace]:
        asked.append(arguments[:3])
        return [
            SessionPlace(open=lambda part: load_graph(folder, part, 1, ON_CPU), device_type="cpu")
            for _ in arguments[1]
        ]

    monkeypatch.setattr(module, "gpu_places", places)
    monkeypatch.setattr(cuda, "device_properties", asked.append)
    backend = OnnxRuntimeBackend(parts, provider=provider, devices=[0, 3])
    assert asked == [0, 3, (provider, (0, 3), 1)]
    assert (backend.name, backend.threads, backend.pads) == ("onnxruntime", 1, True)
    batch, wanted = make_batch([300, 20, 300, 300, 300]), Wanted(hidden_states=True, pooled=True)
    found, expected = backend.run(batch, wanted), OnnxRuntimeBackend(parts, threads=1).run(batch, wanted)
    # float32 sums in another order.
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=0, atol=1e-4)
    asked.clear()
    OnnxRuntimeBackend(parts, provider=provider, threads=2).close()
    assert asked == [0, (provider, (0,), 2)]


def test_a_gpu_that_is_not_there(
    gpu_build: None, parts: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(index: int) -> None:
        raise InputError(f"there is no GPU {index}")

    monkeypatch.setattr(cuda, "device_properties", refuse)
    with pytest.raises(InputError, match="there is no GPU 7"):
        OnnxRuntimeBackend(parts, provider="cuda", devices=[7])


def test_a_provider_that_cannot_be_used(parts: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU_PROVIDER])
    with pytest.raises(
        BackendUnavailableError, match="provider cuda cannot be used here: onnxruntime .* no CUDAExec"
    ):
        OnnxRuntimeBackend(parts, provider="cuda")


def test_an_engine_for_cpus_on_a_gpu(gpu_build: None, demo_engine: Callable[..., Path]) -> None:
    with pytest.raises(BackendUnavailableError, match="exported for CPUs.*--target tensorrt"):
        OnnxRuntimeBackend(EngineFolder.open(demo_engine("fp32")), provider="cuda")


def test_gpus_for_the_cpu(parts: EngineFolder) -> None:
    with pytest.raises(InputError, match="devices are GPUs"):
        OnnxRuntimeBackend(parts, devices=[0])


@pytest.mark.parametrize("problem", [None, "the driver is too old"])
def test_bf16_on_a_cpu(
    problem: str | None, gpu_build: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: problem)
    with open_checkpoint("demo") as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="bf16", target="tensorrt")
    there = problem or "which can be used here"
    advice = rf"no bfloat16 on a CPU.*cuda \({there}\), or .*--backend native --precision bf16"
    with pytest.raises(BackendUnavailableError, match=advice):
        OnnxRuntimeBackend(EngineFolder.open(tmp_path / "engine"))
