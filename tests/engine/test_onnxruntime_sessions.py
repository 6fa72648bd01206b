"""What a failure of ONNX Runtime means: messages that users have reported, and every error of CUDA that loses a GPU."""

from __future__ import annotations

import pytest
from cuda.bindings import runtime

from bertrt.backends import cuda
from bertrt.backends.onnxruntime.sessions import device_failure
from bertrt.errors import DeviceLostError, DeviceMemoryError

NODE = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "Name:'MatMul_92' Status Message: "
)
ARENA = "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal"
PLACE = " ; GPU=0 ; hostname=here ; file=/src/cuda_execution_provider.cc ; line=448 ; expr="


@pytest.mark.parametrize(
    "message",
    [
        f"{NODE}{ARENA}(size_t, bool) Failed to allocate memory for requested buffer of size 939524096",
        f"{NODE}{ARENA}(size_t, bool) Available memory of 1024 is smaller than requested bytes of 4096",
        f"{NODE}CUDA failure 2: out of memory{PLACE}cudaMalloc((void**)&p, size); ",
        f"{NODE}CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED{PLACE}cublasCreate(&handle); ",
        f"{NODE}CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED{PLACE}cudnnCreate(&handle); ",
        "TensorRT EP failed to create engine: Error Code 2: OutOfMemory (Requested size was 8)",
    ],
)
def test_too_little_memory(message: str) -> None:
    failure = device_failure(RuntimeError(message), "onnxruntime failed (GPU 0)")
    assert type(failure) is DeviceMemoryError
    said = f"onnxruntime failed (GPU 0): {message.strip()}; ask for less at once (token_budget)"
    assert str(failure).startswith(said)


def test_what_is_said_in_a_later_line() -> None:
    message = f"{NODE}\n\n{ARENA}(size_t, bool)\nFailed to allocate memory for requested buffer of size 8"
    failure = device_failure(RuntimeError(message), "x")
    assert type(failure) is DeviceMemoryError
    assert str(failure).startswith(f"x: {NODE}{ARENA}(size_t, bool); ask")


@pytest.mark.parametrize("name", sorted(cuda._LOST))
def test_a_lost_gpu(name: str) -> None:
    """By its number, as ONNX Runtime writes it, and by its words, as TensorRT does."""
    error = getattr(runtime.cudaError_t, name)
    words = runtime.cudaGetErrorString(error)[1].decode()
    for message in (
        f"{NODE}CUDA failure {int(error)}: {words}{PLACE}cudaStreamSynchronize(stream); ",
        f"{NODE}\nCUDA error {int(error)}",
    ):
        failure = device_failure(RuntimeError(message), "onnxruntime failed (GPU 1)")
        assert type(failure) is DeviceLostError
        assert "onnxruntime failed (GPU 1): [ONNXRuntimeError]" in str(failure)
        assert "new process" in str(failure)


@pytest.mark.parametrize(
    "words",
    [
        "an illegal memory access was encountered",
        "unspecified launch failure",
        "device-side assert triggered",
        "uncorrectable ECC error encountered",
        "misaligned address",
    ],
)
def test_a_lost_gpu_of_tensorrt(words: str) -> None:
    message = f"TensorRT EP execution context enqueue failed: Error Code 1: Cuda Runtime ({words})"
    assert type(device_failure(RuntimeError(message), "x")) is DeviceLostError


@pytest.mark.parametrize(
    "message",
    [
        "",
        f"{NODE}CUDA failure 1: invalid argument{PLACE}cudaMemcpyAsync(to, from, bytes); ",
        # Numbers that only CUDA's own errors give a meaning.
        f"{NODE}CUDNN failure 3: CUDNN_STATUS_BAD_PARAM{PLACE}cudnnSetTensorNdDescriptor(d); ",
        f"{NODE}CUBLAS failure 7: CUBLAS_STATUS_INVALID_VALUE{PLACE}cublasGemmEx(h); ",
        f"{NODE}CUDA failure 7000: of the future{PLACE}x; ",
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: input_ids Got: 3 Expected: 2",
        "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Where(16)",
    ],
)
def test_what_is_no_fault_of_a_gpu(message: str) -> None:
    assert device_failure(RuntimeError(message), "x") is None
