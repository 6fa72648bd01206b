"""The backend on ONNX Runtime's CPU provider.

It pads: sequences of similar length run together as one ``[batch, sequence]`` block. The heads run on named rows
only (see ``bertrt_export.graph.model``), so what is not asked for costs nothing.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime

from bertrt.backends.base import BatchOutput, Int64, TokenBatch, Wanted, check_request
from bertrt.errors import BackendRunError, EngineClosedError, ManifestError, ShapeMismatchError
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt.manifest import Manifest

NAME = "onnxruntime"
# Under this key of its metadata a graph says, in JSON, which architecture it was built for.
ARCHITECTURE_KEY = "bertrt.architecture"
# A block may hold this many padded tokens for each real one; beyond, sequences go to a block of their own.
_PADDING_LIMIT = 1.15
# Below this many tokens a block costs about the same however small it is, so small blocks are not split further.
_SMALL_BLOCK = 256
_NO_ROWS = np.zeros(0, np.int64)


class OnnxRuntimeBackend:
    """Runs an engine folder's graph with ``onnxruntime``.

    Args:
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.

    Raises:
        BackendRunError: ONNX Runtime cannot load the graph.
        ShapeMismatchError: the graph is not the one of the manifest's architecture.
    """

    def __init__(self, folder: EngineFolder, *, threads: int | None = None) -> None:
        manifest = folder.manifest
        roles = manifest.backends[NAME]
        for role in ("graph", "weights"):
            if role not in roles:
                raise ManifestError(
                    f"engine.json: backend {NAME!r} names no {role!r}; export the engine again"
                )
        self._architecture = manifest.architecture
        self._heads = manifest.heads
        self._threads = threads or usable_cpus()
        path = folder.file(roles["graph"])
        try:
            self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                path, session_options(manifest, self._threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise BackendRunError(
                f"onnxruntime {onnxruntime.__version__} cannot load {path.name!r} of {str(folder.path)!r}: "
                f"{_first_line(error)}; export the engine again, or update onnxruntime"
            ) from error
        _check_interface(self._session, manifest)

    @property
    def name(self) -> str:
        """``"onnxruntime"``."""
        return NAME

    @property
    def threads(self) -> int:
        """Threads of one run."""
        return self._threads

    @property
    def pads(self) -> bool:
        """Each block is padded to its longest sequence."""
        return True

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        """See `bertrt.backends.base.Backend.run`."""
        check_request(batch, wanted, self._architecture, self._heads)
        session = self._session
        if session is None:
            raise EngineClosedError("the engine is closed; load it again")
        return self._run(session, batch, wanted)

    def close(self) -> None:
        """Let go of the session; runs under way still have it, and end as if nothing had happened."""
        self._session = None

    def _run(self, session: onnxruntime.InferenceSession, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        blocks = split_by_length(batch.lengths)
        arrays = _allocate(batch, wanted, self._architecture.hidden_size, self._architecture.vocab_size)
        names = _output_names(wanted)
        if not names:
            return BatchOutput()
        for sequences in blocks:
            block = PaddedBlock(batch, sequences, wanted)
            feeds = block.feeds(wanted, mlm=self._heads.mlm, pooler=self._heads.pooler)
            try:
                results = dict(zip(names, session.run(names, feeds), strict=True))
            except Exception as error:  # as above
                raise BackendRunError(
                    f"onnxruntime failed on {len(sequences)} sequences of up to {block.longest} tokens: "
                    f"{_first_line(error)}"
                ) from error
            block.scatter(results, arrays)
        return BatchOutput(**arrays)


class PaddedBlock:
    """Some sequences of a batch, padded to the longest of them."""

    def __init__(self, batch: TokenBatch, sequences: Int64, wanted: Wanted) -> None:
        lengths = batch.lengths[sequences]
        self.longest = int(lengths.max())
        self.sequences = sequences
        columns = np.arange(self.longest)
        self.real = columns[None, :] < lengths[:, None]
        # Where each real token of the block lies in the packed batch, in the block's row order.
        self.tokens = (batch.offsets[sequences][:, None] + columns[None, :])[self.real]
        self.ids = np.zeros(self.real.shape, np.int32)
        self.ids[self.real] = batch.input_ids[self.tokens]
        self.segments = np.zeros(self.real.shape, np.int32)
        self.segments[self.real] = batch.token_type_ids[self.tokens]
        self.chosen = _NO_ROWS
        self.positions = _NO_ROWS
        if wanted.mlm_positions is not None:
            owner = np.searchsorted(batch.offsets, wanted.mlm_positions, side="right") - 1
            row = np.full(batch.num_sequences, -1, np.int64)
            row[sequences] = np.arange(len(sequences))
            self.chosen = np.flatnonzero(row[owner] >= 0)
            inside = wanted.mlm_positions[self.chosen] - batch.offsets[owner[self.chosen]]
            self.positions = row[owner[self.chosen]] * self.longest + inside

    def feeds(self, wanted: Wanted, *, mlm: bool, pooler: bool) -> dict[str, Any]:
        """The graph's inputs."""
        feeds: dict[str, Any] = {
            "input_ids": self.ids,
            "attention_mask": self.real.astype(np.int32),
            "token_type_ids": self.segments,
        }
        if mlm:
            candidates = wanted.mlm_candidates
            feeds["mlm_positions"] = self.positions
            # Log-probabilities are taken at as many positions as there are rows of candidates.
            scored = len(self.chosen) if wanted.mlm_top_k else 0
            feeds["mlm_candidates"] = (
                np.zeros((scored, 0), np.int64) if candidates is None else candidates[self.chosen]
            )
            feeds["mlm_top_k"] = np.array([wanted.mlm_top_k], np.int64)
        if pooler:
            asked = wanted.pooled or wanted.nsp
            feeds["pooled_sequences"] = np.arange(len(self.sequences)) if asked else _NO_ROWS
        return feeds

    def scatter(self, results: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Put the block's results into the places of the whole batch."""
        for name, values in results.items():
            if name == "hidden_states":
                arrays[name][self.tokens] = values[self.real]
            elif name in {"pooled", "nsp_logits"}:
                arrays[name][self.sequences] = values
            else:
                arrays[name][self.chosen] = values


def split_by_length(lengths: Int64) -> list[Int64]:
    """Group sequences so that little of each padded block is padding.

    Args:
        lengths: ``[sequences] int64``, tokens of each.

    Returns:
        For each block the indices of its sequences, longest first; every sequence is in one block.
    """
    order = np.argsort(-lengths, kind="stable")
    blocks: list[Int64] = []
    start, real, longest = 0, 0, 0
    for index, length in enumerate(lengths[order].tolist()):
        longest = longest or length
        real += length
        padded = longest * (index - start + 1)
        if padded > _SMALL_BLOCK and padded > _PADDING_LIMIT * real and index > start:
            blocks.append(order[start:index])
            start, real, longest = index, length, length
    blocks.append(order[start:])
    return blocks


def session_options(manifest: Manifest, threads: int) -> onnxruntime.SessionOptions:
    """How an engine's graph is run, whatever loads it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The exporter has fused what pays; what the library would fuse beyond that is slower (kernels/NOTES.md).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Every failure is raised, so nothing needs to be printed beside it.
    options.log_severity_level = 4
    # A pattern is kept for each shape ever seen, and we see many.
    options.enable_mem_pattern = False
    if manifest.precision == "int8":
        # Without VNNI the kernels for u8 x s8 add pairs of products in 16 bits and saturate. With this, ONNX
        # Runtime takes the exact ones for u8 x u8 on such a processor, and changes nothing on others.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _check_interface(session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    sizes, heads = manifest.architecture, manifest.heads
    try:
        built_for = json.loads(session.get_modelmeta().custom_metadata_map.get(ARCHITECTURE_KEY, "{}"))
    except ValueError:
        built_for = {}
    for name, value in sizes.to_json().items():
        if built_for.get(name) != value:
            raise ShapeMismatchError(
                f"the graph was built for {name} {built_for.get(name, 'unknown')}, the manifest's architecture "
                f"says {value}; export the engine again"
            )
    expected: dict[str, int] = {"hidden_states": sizes.hidden_size}
    if heads.mlm:
        expected["mlm_logits"] = sizes.vocab_size
    if heads.pooler:
        expected["pooled"] = sizes.hidden_size
    if heads.nsp:
        expected["nsp_logits"] = 2
    found = {output.name: output.shape[-1] for output in session.get_outputs() if output.shape}
    for name, width in expected.items():
        if found.get(name) != width:
            raise ShapeMismatchError(
                f"the graph's output {name!r} has width {found.get(name, 'none: it is absent')}, the manifest's "
                f"architecture says {width}; export the engine again"
            )
    inputs = {"input_ids", "attention_mask", "token_type_ids"}
    inputs |= {"mlm_positions", "mlm_candidates", "mlm_top_k"} if heads.mlm else set()
    inputs |= {"pooled_sequences"} if heads.pooler else set()
    if (given := {value.name for value in session.get_inputs()}) != inputs:
        raise ShapeMismatchError(
            f"the graph's inputs are {', '.join(sorted(given))}; the manifest's heads imply "
            f"{', '.join(sorted(inputs))}; export the engine again"
        )


def _output_names(wanted: Wanted) -> list[str]:
    names = []
    if wanted.mlm_positions is not None:
        names += ["mlm_logits"] if wanted.mlm_logits else []
        names += ["mlm_top_ids", "mlm_top_log_probs"] if wanted.mlm_top_k else []
        names += ["mlm_candidate_log_probs"] if wanted.mlm_candidates is not None else []
    names += ["hidden_states"] if wanted.hidden_states else []
    names += ["pooled"] if wanted.pooled else []
    names += ["nsp_logits"] if wanted.nsp else []
    return names


def _allocate(batch: TokenBatch, wanted: Wanted, hidden: int, vocab: int) -> dict[str, Any]:
    rows = 0 if wanted.mlm_positions is None else len(wanted.mlm_positions)
    candidates = 0 if wanted.mlm_candidates is None else wanted.mlm_candidates.shape[1]
    shapes: dict[str, tuple[int, int]] = {
        "mlm_logits": (rows, vocab),
        "mlm_top_ids": (rows, wanted.mlm_top_k),
        "mlm_top_log_probs": (rows, wanted.mlm_top_k),
        "mlm_candidate_log_probs": (rows, candidates),
        "hidden_states": (batch.num_tokens, hidden),
        "pooled": (batch.num_sequences, hidden),
        "nsp_logits": (batch.num_sequences, 2),
    }
    types: dict[str, type[np.generic]] = {"mlm_top_ids": np.int64}
    return {name: np.empty(shapes[name], types.get(name, np.float32)) for name in _output_names(wanted)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
