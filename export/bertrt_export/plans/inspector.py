"""What the library's inspector tells of a finished plan, where there is a GPU that can load it."""

from __future__ import annotations

import json
from collections import Counter
from types import ModuleType
from typing import Any, Final

from bertrt.backends.tensorrt.library import collect_messages, library_logger
from bertrt.errors import PlanBuildError
from bertrt_export.plans.complaints import describe_messages

_QUANTIZED: Final = {"int8": "Int8", "fp8": "FP8"}


def inspect_plan(module: ModuleType, data: Any, part: str) -> dict[str, Any]:
    """Load a plan on the current GPU and describe its layers.

    Returns:
        ``device_memory``: bytes that each context takes for intermediate results. ``layers``: how many there are.
        ``kinds``: how many of each kind. ``int8``, ``fp8``: how many have inputs or outputs of that type.

    Raises:
        PlanBuildError: the library does not load what it has just built.
    """
    with collect_messages() as messages:
        try:
            runtime = module.Runtime(library_logger(module))
            engine = runtime.deserialize_cuda_engine(data)
            if engine is not None:
                inspector = engine.create_engine_inspector()
                text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
                return {"device_memory": int(engine.device_memory_size_v2), **summarize_layers(text)}
            said = describe_messages(messages)
        except PlanBuildError:
            raise
        except Exception as error:  # the bindings' exceptions have no common base but this
            said = describe_messages(messages) if messages.errors else str(error)
    raise PlanBuildError(
        f"{module.__name__} built a plan of part {part!r} that it does not load on this machine's GPU: {said}"
    )


def summarize_layers(text: str) -> dict[str, Any]:
    """Count the layers of the inspector's JSON.

    Raises:
        PlanBuildError: it is not JSON with a list of layers.
    """
    try:
        layers = json.loads(text)["Layers"]
        kinds = Counter(
            str(layer.get("LayerType", "unknown")) if isinstance(layer, dict) else "unknown"
            for layer in layers
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PlanBuildError(
            f"the library's inspector gave no list of layers ({error!r}); report this"
        ) from error
    counts: dict[str, Any] = {"layers": len(layers), "kinds": dict(sorted(kinds.items()))}
    for name, written in _QUANTIZED.items():
        counts[name] = sum(isinstance(layer, dict) and written in _types(layer) for layer in layers)
    return counts


def _types(layer: dict[str, Any]) -> str:
    """The types of a layer's inputs and outputs, as one text."""
    tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    return " ".join(str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))) for tensor in tensors)
