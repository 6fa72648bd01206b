"""The stand-ins for CUDA and TensorRT beside the real ones, else what the tests prove would be worth nothing.

Names, numbers of enumerations and of errors, and how many arguments a function takes. `tensorrt`, which is not
installed where there is no GPU, has the same interface as `tensorrt_rtx` but for what `fake_tensorrt` gives the latter
alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda.bindings.driver
import cuda.bindings.runtime
import fake_cuda
import fake_tensorrt
import pytest
import tensorrt_rtx

from bertrt.folder import EngineFolder


def parameters(function: Any) -> int:
    """How many a function of CUDA's bindings has, by the first line of its documentation."""
    signature = function.__doc__.splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    return len(inside.split(",")) if inside.strip() else 0


@pytest.mark.parametrize("name", ["runtime", "driver"])
def test_functions_of_cuda(name: str) -> None:
    real = {"runtime": cuda.bindings.runtime, "driver": cuda.bindings.driver}[name]
    fake = fake_cuda.Gpu()
    module = {"runtime": fake.runtime, "driver": fake.driver_module}[name]
    names = [
        name
        for name in vars(module)
        if name.startswith(("cuda", "cu", "CU")) and name not in {"cudaError_t", "CUcontext"}
    ]
    assert names
    for found in names:
        value = getattr(module, found)
        if isinstance(value, int):
            assert int(getattr(real, found)) == value
        elif hasattr(value, "body"):
            assert parameters(getattr(real, found)) == value.body.__code__.co_argcount, found
        else:
            for member, number in vars(value).items():
                assert int(getattr(getattr(real, found), member)) == number
    if name == "runtime":
        for error in fake_cuda.cudaError_t:
            assert int(getattr(real.cudaError_t, error.name)) == error.value
    assert int(cuda.bindings.driver.CUcontext(0)) == 0


def arities(function: Any) -> list[range]:
    """How many arguments a method of TensorRT's bindings takes, itself not counted, in each of its overloads."""
    found = []
    for inside in re.findall(r"^(?:\d+\. )?\s*\w+\(self: [\w.]+(.*)\) -> ", function.__doc__, re.MULTILINE):
        # Of "name: type = default" the defaults may have brackets and commas of their own.
        given = re.findall(r", \w+: ", inside)
        found.append(range(len(given) - inside.count(" = "), len(given) + 1))
    return found


def arity(function: Any) -> int:
    return len(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def plans(fake_plans: Callable[..., EngineFolder]) -> Path:
    return fake_plans("tensorrt_rtx", profiles=("1x1..1x32..1x64",), most_mlm_rows=8).path


@pytest.fixture
def objects(gpu: Any, plans: Path) -> dict[str, Any]:
    """One of every kind, made as the runtime makes them, by the name of its real class."""
    module = fake_tensorrt.make_library(gpu, "tensorrt_rtx")
    gpu.choose(0)
    runtime = module.Runtime(module.ILogger())
    engine = runtime.deserialize_cuda_engine((plans / "pooler.plan").read_bytes())
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    return {
        "Runtime": runtime,
        "ICudaEngine": engine,
        "IRuntimeConfig": config,
        "IRuntimeCache": config.create_runtime_cache(),
        "IExecutionContext": engine.create_execution_context(config),
    }


def test_objects_of_tensorrt_have_nothing_that_the_real_ones_lack(objects: dict[str, Any]) -> None:
    compared = 0
    for kind, fake in objects.items():
        real = getattr(tensorrt_rtx, kind)
        # Whether it is of the class or was set when the object was made.
        for name in (name for name in dir(fake) if not name.startswith("_")):
            theirs = inspect.getattr_static(real, name, None)
            assert theirs is not None, f"{kind}.{name}"
            ours = inspect.getattr_static(type(fake), name, None)
            if isinstance(theirs, property):
                assert isinstance(ours, property), f"{kind}.{name}"
                assert (ours.fset is None) or theirs.fset is not None, f"{kind}.{name} cannot be set"
            else:
                taken = arities(getattr(real, name))
                assert any(arity(getattr(fake, name)) in numbers for numbers in taken), f"{kind}.{name}"
            compared += 1
    assert compared > 20


def test_what_the_comparison_reads_of_the_real_ones() -> None:
    """Documentation of the real classes in which nothing is found would let everything pass."""
    assert arities(tensorrt_rtx.IExecutionContext.set_tensor_address) == [range(2, 3)]
    assert arities(tensorrt_rtx.IExecutionContext.set_input_shape) == [range(2, 3)] * 3
    assert arities(tensorrt_rtx.IRuntimeConfig.set_runtime_cache) == [range(2)]
    assert arities(tensorrt_rtx.IRuntimeConfig.create_runtime_cache) == [range(1)]
    assert arities(tensorrt_rtx.ICudaEngine.create_execution_context) == [range(2)] * 2


def test_the_module_of_tensorrt(gpu: Any) -> None:
    module = fake_tensorrt.make_library(gpu, "tensorrt_rtx")
    for name in (name for name in vars(module) if not name.startswith("_")):
        assert hasattr(tensorrt_rtx, name), name
    for kind in (*fake_tensorrt.ENUMS, *fake_tensorrt.RTX_ENUMS):
        real = getattr(tensorrt_rtx, kind.__name__)
        for member in kind:
            assert int(getattr(real, member.name)) == member.value
    assert kind_names(fake_tensorrt.ComputeCapability) == list(tensorrt_rtx.ComputeCapability.__members__)
    for name in ("ERROR", "WARNING"):
        assert int(getattr(tensorrt_rtx.ILogger, name)) == getattr(module.ILogger, name)
    assert arity(module.Runtime) == 1
    # What TensorRT for RTX has and TensorRT does not.
    plain = fake_tensorrt.make_library(gpu, "tensorrt")
    assert vars(module).keys() - vars(plain).keys() == {kind.__name__ for kind in fake_tensorrt.RTX_ENUMS}


def kind_names(kind: Any) -> list[str]:
    return [member.name for member in kind]
