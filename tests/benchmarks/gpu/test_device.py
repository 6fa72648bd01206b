"""The GPU through its driver's library, which is compiled here from the declarations of ``nvml.h``."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from bertrt.errors import BackendUnavailableError, InputError
from bertrt_bench.gpu.device import LIBRARY, Gpu


def test_what_a_gpu_is(fake_gpu: Gpu) -> None:
    assert fake_gpu.facts.to_json() == {
        "name": "NVIDIA Abacus",
        "compute_capability": "8.9",
        "memory_bytes": 24_000_000_000,
        "used_bytes": 5_000_000_001,
        "driver": "580.01",
        "cuda": "13.1",
        "power_limit_w": 72.0,
    }
    assert fake_gpu.used_bytes() == 5_000_000_001
    assert fake_gpu.state().to_json() == {
        "sm_mhz": 1000,
        "memory_mhz": 2000,
        "temperature_c": 45,
        "power_w": 61.5,
    }


def test_a_gpu_that_says_no_more_than_it_must(nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "silent")
    with Gpu(nvml, {}) as gpu:
        assert gpu.facts.power_limit_w is None
        assert set(asdict(gpu.state()).values()) == {None}


@pytest.mark.parametrize("visible", ["0", "0,1", "GPU-0123", " GPU-0123 , GPU-4567"])
def test_the_gpu_that_is_visible(nvml: str, visible: str) -> None:
    with Gpu(nvml, {"CUDA_VISIBLE_DEVICES": visible}) as gpu:
        first = visible.split(",")[0].strip()
        assert gpu.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": first}


@pytest.mark.parametrize("visible", ["", "-1", ",0"])
def test_all_gpus_hidden(nvml: str, visible: str) -> None:
    with pytest.raises(BackendUnavailableError, match="hides every GPU; name one, or leave it unset"):
        Gpu(nvml, {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize("visible", ["1", "GPU-9999"])
def test_a_gpu_that_is_not_there(nvml: str, visible: str) -> None:
    with pytest.raises(
        InputError, match=rf"names the GPU '{visible}'.* \(Not Found\); .* nvidia-smi --list-gpus"
    ):
        Gpu(nvml, {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("no-driver", r"the NVIDIA driver does not start \(Driver Not Loaded\)"),
        ("no-gpu", "the NVIDIA driver sees none"),
    ],
)
def test_no_gpu(nvml: str, monkeypatch: pytest.MonkeyPatch, mood: str, message: str) -> None:
    monkeypatch.setenv("FAKE_NVML", mood)
    with pytest.raises(BackendUnavailableError, match=f"no GPU here: {message}.*--device cpu"):
        Gpu(nvml, {})


def test_no_driver() -> None:
    with pytest.raises(
        BackendUnavailableError, match=f"library no-{LIBRARY} cannot be loaded; run on .* --device cpu"
    ):
        Gpu(f"no-{LIBRARY}", {})


def test_a_driver_that_fails(nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CAPABILITY", "none")
    with pytest.raises(
        BackendUnavailableError, match=r"nvmlDeviceGetCudaComputeCapability failed \(Other Error\)"
    ):
        Gpu(nvml, {})
