"""The float32 encoder with what enters its products exposed, run in bounded memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from bertrt.backends.base import Float32, Wanted
from bertrt.backends.onnxruntime.sessions import first_line
from bertrt.backends.padded import PaddedBlock
from bertrt.backends.parts import ENCODER
from bertrt.batching import pack, plan_batches
from bertrt.errors import CalibrationError
from bertrt.tokenization import Encoded
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.graph.emitter import WEIGHTS_NAME, WeightFile
from bertrt_export.graph.parts import build_part

# Float32 values of all taps of one batch: 128 MiB. One sequence that needs more is a batch of its own.
_VALUES_AT_ONCE: Final = 32 << 20


class Taps:
    """Runs sequences and shows what enters each product.

    Args:
        session: of the encoder, with the tapped values among its outputs.
        values: the tapped value of each product.
        channels: of each product's input.

    Attributes:
        channels: of each product's input, in the order of the graph.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, values: Mapping[str, str], channels: Mapping[str, int]
    ) -> None:
        self._session = session
        self._values = dict(values)
        self.channels = dict(channels)

    def batches(self, sequences: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """Cut sequences into batches of similar length whose taps fit the memory that is meant for them."""
        budget = max(1, _VALUES_AT_ONCE // sum(self.channels.values()))
        lengths = [sequence.input_ids.shape[0] for sequence in sequences]
        for indices in plan_batches(lengths, token_budget=budget):
            yield [sequences[index] for index in indices]

    def run(self, batch: Sequence[Encoded]) -> Iterator[tuple[str, Float32]]:
        """Each product with its input's rows, ``[tokens, channels] float32``, padding left out.

        Raises:
            CalibrationError: ONNX Runtime failed.
        """
        block = PaddedBlock(pack(batch), np.arange(len(batch)), Wanted())
        names = list(dict.fromkeys(self._values.values()))
        try:
            found = dict(zip(names, self._session.run(names, block.encoder_feeds()), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise CalibrationError(
                f"onnxruntime failed on {block.shape[0]} sequences of up to {block.shape[1]} tokens: "
                f"{first_line(error)}; calibrate with fewer tokens"
            ) from error
        for product, name in self._values.items():
            yield product, found[name][block.real]


@contextlib.contextmanager
def open_taps(checkpoint: Checkpoint, *, threads: int) -> Iterator[Taps]:
    """Build the float32 encoder in a temporary folder and load it; both are gone afterwards.

    Raises:
        CalibrationError: the folder cannot be written, or ONNX Runtime cannot load the graph.
        CheckpointError: a tensor is missing, or not finite.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertrt-calibration-")))
            taps = _load(checkpoint, folder, threads)
        except OSError as error:
            raise CalibrationError(
                f"cannot write the float32 graph to the temporary folder {tempfile.gettempdir()!r}: "
                f"{error.strerror}; make room there, or set TMPDIR"
            ) from error
        yield taps


def _load(checkpoint: Checkpoint, folder: Path, threads: int) -> Taps:
    weights = WeightFile(folder / WEIGHTS_NAME)
    try:
        encoder = build_part(checkpoint, weights, ENCODER, precision="fp32")
    finally:
        weights.close()
    sizes = checkpoint.architecture
    wide = {f"encoder.layer.{layer}.output.dense" for layer in range(sizes.num_hidden_layers)}
    channels = {
        product: sizes.intermediate_size if product in wide else sizes.hidden_size
        for product in encoder.inputs
    }
    shapes = {value: channels[product] for product, value in encoder.inputs.items()}
    encoder.model.graph.output.extend(
        helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", "sequence", width])
        for value, width in shapes.items()
    )
    path = folder / f"{ENCODER}.onnx"
    path.write_bytes(encoder.model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    # An arena keeps what the largest batch needed, and the batches differ in shape.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise CalibrationError(
            f"onnxruntime {onnxruntime.__version__} cannot load the float32 graph: {first_line(error)}; update "
            "onnxruntime"
        ) from error
    return Taps(session, encoder.inputs, channels)
