"""What is told of a finished plan, where there is a GPU that can load it."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import pytest

from bertrt.backends.tensorrt.library import find_library
from bertrt.errors import PlanBuildError
from bertrt_export.plans.inspector import inspect_plan, summarize_layers

LAYERS = json.dumps(
    {
        "Layers": [
            {
                "Name": "a",
                "LayerType": "gemm",
                "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            },
            {"Name": "b", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "FP8"}], "Outputs": []},
            {"Name": "c", "LayerType": "kgen"},
            "d",
        ]
    }
)


def test_layers_are_counted() -> None:
    assert summarize_layers(LAYERS) == {
        "layers": 4,
        "kinds": {"gemm": 2, "kgen": 1, "unknown": 1},
        "int8": 1,
        "fp8": 1,
    }


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}'])
def test_what_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(PlanBuildError, match="gave no list of layers"):
        summarize_layers(text)


def test_bindings_that_raise() -> None:
    def refuse() -> None:
        raise RuntimeError("no inspector")

    engine = SimpleNamespace(create_engine_inspector=refuse)
    with pytest.raises(PlanBuildError, match="a plan of part 'mlm' that it does not .*: no inspector"):
        inspect_plan(make_module(engine), b"plan", "mlm")


def make_module(engine: object) -> ModuleType:
    module = ModuleType("a_library")
    real = find_library("tensorrt_rtx")
    module.ILogger, module.LayerInformationFormat = real.ILogger, real.LayerInformationFormat
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    return module


def test_a_plan_that_loads() -> None:
    inspector = SimpleNamespace(get_engine_information=lambda kind: LAYERS)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size_v2=4096)
    found = inspect_plan(make_module(engine), b"plan", "mlm")
    assert found["device_memory"] == 4096
    assert found["layers"] == 4


def test_a_plan_that_does_not_load() -> None:
    with pytest.raises(
        PlanBuildError, match="a plan of part 'mlm' that it does not load on this machine's GPU"
    ):
        inspect_plan(make_module(None), b"plan", "mlm")
