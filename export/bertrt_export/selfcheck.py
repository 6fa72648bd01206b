"""What every new engine must pass before it takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from bertrt.backends.native import load_kernels
from bertrt.backends.onnxruntime.sessions import first_line, session_options
from bertrt.backends.parts import CANDIDATES, part_inputs, parts_of
from bertrt.errors import BackendUnavailableError, ExportError, KernelsNotBuiltError
from bertrt.manifest import Manifest, Precision
from bertrt_export.graph.twin import float32_twin, open_session
from bertrt_export.targets import NATIVE

_Outputs = dict[str, npt.NDArray[np.float32]]

# The two graphs share weights and operators; they differ in the shape of their products only, hence in the order
# of float32 sums. Larger differences would mean that they are two models.
_TOLERANCE: Final = 1e-3
# In float16 a value at the border of two steps falls to either side: 2^-11 of it, grown through the heads.
_PARTS_TOLERANCE: Final = 1e-2
# Between two backends, as root mean squares: an answer of zeros is off by 1, another model's by about the square root
# of 2. fp32 differs in the order of sums. In int8 the backends share the weights' values, but round activations to
# other steps: an error of some per cent, more in models with outlying activations.
_BACKENDS_TOLERANCE: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "int8": 0.3}
# An answer that is as good as nothing is not held to be exact. There are few next-sentence logits, which may all be
# near zero.
_SMALLEST: Final = {"hidden_states": 1e-6, "mlm_logits": 0.01, "pooled": 0.01, "nsp_logits": 1.0}


@dataclass(frozen=True, slots=True)
class _Probe:
    """Three sequences ``[3, length]``: a full one, one of a single token, and one that is nothing but padding."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]

    @classmethod
    def make(cls, manifest: Manifest) -> _Probe:
        sizes = manifest.architecture
        length = min(8, sizes.max_position_embeddings)
        ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (3, length))
        mask = np.ones((3, length), np.int64)
        mask[1, 1:] = 0
        mask[2] = 0
        segments = np.minimum(np.arange(3 * length).reshape(3, length) % 2, sizes.type_vocab_size - 1)
        return cls(ids, mask, segments)


def check_engine(folder: Path, manifest: Manifest, graphs: dict[str, onnx.ModelProto]) -> None:
    """Validate the graphs, and run all that the folder has for the backends once.

    The run holds a sequence of one token, a full one and one that is nothing but padding: no output may be NaN or
    infinite. The runtime's graph must agree with the standard one, and the native kernels' answers with the graphs'.
    The native kernels are left out where they are not built.

    Raises:
        ExportError: a graph is invalid, cannot be run, gives NaN, or two answers disagree; the kernels are built but
            do not load.
    """
    probe = _Probe.make(manifest)
    if manifest.target == "tensorrt":
        _check_parts(folder, manifest, graphs, probe)
        return
    engine = _check_graphs(folder, manifest, graphs, probe) if graphs else None
    if NATIVE not in manifest.backends:
        return
    native = _run_native(folder, manifest, probe)
    if native is not None:
        _check_finite(manifest.backends[NATIVE]["weights"], native, manifest)
        if engine is not None:
            _check_backends(native, engine, manifest.precision, probe)


def _check_graphs(
    folder: Path, manifest: Manifest, graphs: dict[str, onnx.ModelProto], probe: _Probe
) -> _Outputs:
    _check_valid(folder, graphs)
    standard, engine = (_run_graph(folder / name, manifest, probe) for name in ("model.onnx", "engine.onnx"))
    _check_finite("model.onnx", standard, manifest)
    _check_finite("engine.onnx", engine, manifest)
    _check_standard(engine, standard, _TOLERANCE)
    return engine


def _check_parts(folder: Path, manifest: Manifest, graphs: dict[str, onnx.ModelProto], probe: _Probe) -> None:
    """Run the parts one after the other, and the standard graph, each as its twin on the CPU."""
    _check_valid(folder, graphs)
    twins = {
        name: open_session(float32_twin(graph), folder, manifest, threads=0) for name, graph in graphs.items()
    }
    feeds: dict[str, npt.NDArray[Any]] = {
        "input_ids": probe.ids.astype(np.int32),
        "attention_mask": probe.mask.astype(np.int32),
        "token_type_ids": probe.segments.astype(np.int32),
    }
    found = _run_session(twins["encoder.onnx"], feeds)
    width = manifest.architecture.hidden_size
    feeds = {
        "hidden_states": found["hidden_states"].reshape(-1, width),
        "mlm_positions": np.arange(probe.ids.size),
        "mlm_candidates": np.zeros((probe.ids.size, CANDIDATES), np.int64),
        "pooled_rows": np.arange(probe.ids.shape[0]) * probe.ids.shape[1],
    }
    for part in parts_of(manifest.heads)[1:]:
        names = part_inputs(part)
        found |= _run_session(twins[f"{part}.onnx"], {name: feeds[name] for name in names})
    _check_finite("the parts", found, manifest)
    given = {"input_ids": probe.ids, "attention_mask": probe.mask, "token_type_ids": probe.segments}
    # The same nodes: what is left is what values at the border of two steps make.
    _check_standard(found, _run_session(twins["model.onnx"], given), _PARTS_TOLERANCE)


def _run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> _Outputs:
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ExportError(f"onnxruntime cannot run the engine's graphs: {first_line(error)}") from error


def _check_valid(folder: Path, graphs: Mapping[str, onnx.ModelProto]) -> None:
    for name in graphs:
        try:
            onnx.checker.check_model(str(folder / name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{name} is not valid ONNX: {str(error).splitlines()[0]}") from error


def _check_standard(engine: _Outputs, standard: _Outputs, tolerance: float) -> None:
    """Compare the runtime's graphs with the standard one."""
    for ours, theirs in (
        ("hidden_states", "last_hidden_state"),
        ("mlm_logits", "logits"),
        ("pooled", "pooler_output"),
        ("nsp_logits", "seq_relationship_logits"),
    ):
        if ours not in engine:
            continue
        expected = standard[theirs].reshape(engine[ours].shape)
        difference = np.abs(engine[ours] - expected).max() / max(1.0, np.abs(expected).max())
        if difference > tolerance:
            raise ExportError(f"the two graphs disagree about {ours} by {difference:.2g} (relative)")


def _check_finite(file: str, outputs: _Outputs, manifest: Manifest) -> None:
    for output, values in outputs.items():
        if not np.isfinite(values).all():
            raise ExportError(
                f"{file} gives {int((~np.isfinite(values)).sum())} values that are not finite in {output!r}; "
                f"the checkpoint's weights are out of reach of {manifest.precision}: try another precision"
            )


def _check_backends(native: _Outputs, graph: _Outputs, precision: Precision, probe: _Probe) -> None:
    tokens = probe.mask.astype(bool)
    chosen = {
        "hidden_states": lambda values: values[tokens],
        "mlm_logits": lambda values: values[tokens.ravel()],
        "pooled": lambda values: values[:2],
        "nsp_logits": lambda values: values[:2],
    }
    for output, values in native.items():
        expected = chosen[output](graph[output])
        size = _rms(expected)
        if output == "hidden_states":
            # They share a large part, which those of another model may have too.
            size = max(_rms(expected - expected.mean(axis=0)), 0.01 * size)
        difference = _rms(values - expected) / max(size, _SMALLEST[output])
        if not difference <= _BACKENDS_TOLERANCE[precision]:
            raise ExportError(
                f"the native kernels and onnxruntime disagree about {output} by {difference:.2g} (relative), at most "
                f"{_BACKENDS_TOLERANCE[precision]:g} is expected of {precision}; export for one of them, and measure "
                "it with 'bertrt drift'"
            )


def _rms(values: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _run_native(folder: Path, manifest: Manifest, probe: _Probe) -> _Outputs | None:
    """The outputs for the first two sequences, packed; ``None`` where the kernels are not built."""
    try:
        kernels = load_kernels()
    except KernelsNotBuiltError:
        return None
    except BackendUnavailableError as error:
        raise ExportError(f"cannot check the engine: {error}") from error
    name = manifest.backends[NATIVE]["weights"]
    tokens = probe.mask.astype(bool)
    options: dict[str, Any] = {"hidden_states": True}
    if manifest.heads.mlm:
        options |= {"mlm_logits": True, "mlm_positions": np.arange(tokens.sum())}
    if manifest.heads.pooler:
        options |= {"pooled": True, "nsp": manifest.heads.nsp}
    try:
        outputs: _Outputs = kernels.Engine(str(folder / name), verify=True).run(
            probe.ids[tokens].astype(np.int32),
            probe.segments[tokens].astype(np.int32),
            np.cumsum([0, *tokens[:2].sum(axis=1)]),
            **options,
        )
    except (kernels.Error, MemoryError) as error:
        raise ExportError(f"the native kernels cannot run {name}: {error}") from error
    return outputs


def _run_graph(path: Path, manifest: Manifest, probe: _Probe) -> _Outputs:
    try:
        session = onnxruntime.InferenceSession(
            path, session_options(manifest, threads=0), providers=["CPUExecutionProvider"]
        )
        feeds = {"input_ids": probe.ids, "attention_mask": probe.mask, "token_type_ids": probe.segments}
        extra = {
            "mlm_positions": np.arange(probe.ids.size),
            "mlm_candidates": np.zeros((probe.ids.size, 1), np.int64),
            "mlm_top_k": np.array([min(5, manifest.architecture.vocab_size)], np.int64),
            "pooled_sequences": np.arange(3),
        }
        inputs = {given.name: given.type for given in session.get_inputs()}
        feeds = {
            name: feed.astype(np.int32 if inputs[name] == "tensor(int32)" else np.int64)
            for name, feed in (feeds | extra).items()
            if name in inputs
        }
    except Exception as error:  # as above
        raise ExportError(f"onnxruntime cannot run {path.name}: {first_line(error)}") from error
    return _run_session(session, feeds)
