"""From the reference checkpoint to the model files of rivals, in processes of their own.

A conversion brings libraries, memory and thread pools that are of no use to the contestant later.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bertrt.errors import MeasurementError
from bertrt.manifest import Dialect
from bertrt_bench.cases import Task
from bertrt_bench.child import interpreter, last_words, obituary

# The output of the standard graph that answers each task; the others are cut away. The masked-LM head runs at
# every position, because that is the model that users of transformers export.
OUTPUTS: Final[Mapping[Task, str]] = {
    "features": "last_hidden_state",
    "fill-mask": "logits",
    "fill-mask-text": "logits",
    "mlm-all": "logits",
    "next-sentence": "seq_relationship_logits",
}
INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")


def convert(function: str, arguments: Mapping[str, Any]) -> None:
    """Call ``module:function`` with keywords that JSON can say, and wait for it.

    Raises:
        MeasurementError: it failed; what it printed is on standard error, and its last line in the message.
    """
    # In the worker's session, not in one of its own: it ends with the worker.
    done = subprocess.run(  # noqa: S603 - this interpreter, and functions of ours
        [*interpreter(__name__), function, json.dumps(arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    printed = done.stdout.decode("utf-8", "backslashreplace")
    sys.stderr.write(printed)
    sys.stderr.flush()
    if done.returncode != 0:
        raise MeasurementError(
            f"cannot convert the reference checkpoint: {function} {obituary(done.returncode)}{last_words(printed)}"
        )


def write_float32(reference: str, folder: Path, output: str, dialect: Dialect) -> Path:
    """Write the float32 graph of a Hugging Face folder with one output only, and return its path."""
    # In the process of the conversion only.
    import onnx.utils

    from bertrt_export.checkpoints import open_checkpoint
    from bertrt_export.graph.emitter import WEIGHTS_NAME, WeightFile
    from bertrt_export.graph.model import build_graph

    weights = WeightFile(folder / WEIGHTS_NAME)
    try:
        with open_checkpoint(Path(reference)) as checkpoint:
            graph = build_graph(checkpoint, weights, precision="fp32", dialect=dialect, interface="standard")
    finally:
        weights.close()
    path = folder / "float32.onnx"
    # The weights stay where they are; those that the output does not need are not referred to.
    part = onnx.utils.Extractor(graph).extract_model(list(INPUTS), [output])
    path.write_bytes(part.SerializeToString())
    return path


def main() -> int:
    """Do what `convert` asked for."""
    # Late, as this module is what the worker imports.
    from bertrt_bench.contestants.base import load_factory

    name, arguments = sys.argv[1:]
    function: Any = load_factory(name)
    function(**json.loads(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
