"""Sessions on ONNX Runtime's providers for GPUs: their options, and a CPU that takes their place unasked.

No GPU is needed: what the library would be told is looked at, and what it does without its libraries it does here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from bertrt.architecture import BertArchitecture
from bertrt.backends.buckets import Buckets, row_bucket
from bertrt.backends.onnxruntime import providers as onnxruntime_providers
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import MLM_ROWS
from bertrt.backends.onnxruntime.providers import (
    CUDA,
    TENSORRT,
    check_providers,
    gpu_places,
    profiles_of,
)
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, GPU_REMEDY, load_graph
from bertrt.errors import BackendRunError, BackendUnavailableError
from bertrt.folder import EngineFolder

ON_CPU = [(CPU_PROVIDER, {})]


@pytest.fixture
def parts(exported: Callable[[str], EngineFolder]) -> EngineFolder:
    """The demo engine in parts, in float32."""
    return exported("fp32")


def test_a_cpu_in_the_place_of_a_gpu(parts: EngineFolder) -> None:
    """ONNX Runtime leaves a provider out whose libraries do not load, and says nothing in its answer."""
    session = load_graph(parts, "encoder", 1, ON_CPU)
    with pytest.raises(
        BackendUnavailableError, match=f"asked for its provider {CUDA} and took {CPU_PROVIDER}"
    ):
        check_providers(session, [(CUDA, {})], "encoder")


def test_nodes_that_the_cpu_would_compute(parts: EngineFolder) -> None:
    session = load_graph(parts, "encoder", 1, ON_CPU)
    with pytest.raises(
        BackendUnavailableError, match="would compute on the CPU .*: Add, Attention, "
    ) as caught:
        check_providers(session, ON_CPU, "encoder")
    # Which ONNX Runtime computes there on purpose.
    assert "Shape" not in str(caught.value)


def assigned(**operators: list[str]) -> Any:
    """A session that says which operators are whose."""
    names = {"tensorrt": TENSORRT, "cuda": CUDA, "cpu": CPU_PROVIDER}
    graphs = [
        SimpleNamespace(
            ep_name=names[provider],
            get_nodes=lambda found=found: [SimpleNamespace(op_type=name) for name in found],
        )
        for provider, found in operators.items()
    ]
    return SimpleNamespace(
        get_providers=lambda: [names[provider] for provider in operators],
        get_provider_graph_assignment_info=lambda: graphs,
    )


def test_nodes_that_compute_shapes_may_be_the_cpus() -> None:
    both = ["MatMul", "Attention"]
    asked = [(CUDA, {})]
    assert check_providers(assigned(cuda=both, cpu=["Shape", "Concat"]), asked, "encoder") == []
    with pytest.raises(BackendUnavailableError, match="no kernels for: QuantizeLinear;"):
        check_providers(assigned(cuda=both, cpu=["Shape", "QuantizeLinear"]), asked, "encoder")


@pytest.mark.parametrize(
    ("asked", "found", "remedy"),
    [
        (
            "tensorrt",
            {"tensorrt": [], "cuda": ["MatMul"], "cpu": ["Shape"]},
            f"no node of the encoder ({CUDA} would run it); its parser knows the graphs from TensorRT 10.14 on: "
            'pip install "tensorrt-cu13-libs>=10.14,<11"; or take the provider cuda',
        ),
        (
            "cuda",
            {"cuda": [], "cpu": ["Shape"]},
            "no node of the encoder (no other either would run it); update onnxruntime-gpu",
        ),
    ],
)
def test_a_provider_that_is_there_and_does_nothing(asked: str, found: dict[str, Any], remedy: str) -> None:
    name = {"tensorrt": TENSORRT, "cuda": CUDA}[asked]
    with pytest.raises(BackendUnavailableError, match=re.escape(f"gave its provider {name} {remedy}")):
        check_providers(assigned(**found), [(name, {}), (CUDA, {})], "encoder")


def test_what_tensorrt_leaves_to_cuda_is_said_once_for_each_part(
    parts: EngineFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    session = assigned(tensorrt=["MatMul"], cuda=["TopK", "Gather"], cpu=["Shape"])
    monkeypatch.setattr(onnxruntime_providers, "load_graph", lambda *_: session)
    profiles = profiles_of(parts.manifest.architecture)
    first, second = gpu_places(parts, "tensorrt", [0, 1], 1, profiles)
    for part in ("encoder", "mlm"):
        with pytest.warns(
            RuntimeWarning, match=f"operators of the {part} to CUDA.*: Gather, TopK; the backend"
        ):
            first.open(part)
        # Warnings are errors here.
        assert second.open(part) is session


@pytest.fixture
def on_a_build_for_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """ONNX Runtime itself, which has no provider for GPUs and says so in a warning."""
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="is not in available provider names"):
        yield


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_no_session_of_a_gpu_runs_on_the_cpu(
    provider: str, parts: EngineFolder, on_a_build_for_cpus: None
) -> None:
    """The library's own session, which takes the CPU without an error."""
    assert onnxruntime.get_available_providers()[-1] == CPU_PROVIDER
    [place] = gpu_places(parts, provider, [0], 1, profiles_of(parts.manifest.architecture))
    for part in ("encoder", "mlm", "pooler"):
        with pytest.raises(
            BackendUnavailableError, match=f"was asked for its provider .* took {CPU_PROVIDER}"
        ):
            place.open(part)


def test_a_graph_that_a_gpu_refuses(parts: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph was checked when it was exported: that it shall be exported again is no advice."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(BackendRunError, match="cannot load 'encoder.onnx'.*no kernel image") as caught:
        load_graph(parts, "encoder", 1, ON_CPU)
    assert str(caught.value).endswith(GPU_REMEDY)
    with pytest.raises(BackendRunError, match="export the engine again, or update onnxruntime"):
        load_graph(parts, "encoder", 1)


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
        return assigned(**{provider: ["MatMul"]})

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
    # Beside its place, where it lies once the session is made.
    path = Path(options["trt_engine_cache_path"])
    assert path.parent == tmp_path / "cache" / "onnxruntime-tensorrt"
    [kept] = [entry for entry in path.parent.iterdir() if entry.is_dir()]
    assert path.name == f".{kept.name}.partial"
    assert kept.stat().st_mode & 0o077 == 0
    told, _ = options_of(parts, "tensorrt", monkeypatch)
    assert told[0][1]["trt_engine_cache_path"] == str(kept)


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
    # A place that is there is used.
    assert f".{Path(path(parts)).name}.partial" == Path(found[0]).name


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
